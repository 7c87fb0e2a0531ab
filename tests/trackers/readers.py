"""Reads back what trackers have stored, through their own interfaces where they have one."""

import dataclasses
import html
import re

import numpy as np


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a tracker has.

    Attributes:
      scalars: ((name, step), value), each as often as it is stored.
      histograms: (name, step) -> (counts, edges).
      texts: (name, step) -> text.
      deployed: the text of the results.
      config: the configuration, as text.
    """

    scalars: list
    histograms: dict
    texts: dict
    deployed: str
    config: str


def tensorboard(path, run_id):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    events = EventAccumulator(str(path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    scalars, histograms, texts = [], {}, {}
    for tag in events.Tags()["tensors"]:
        if tag.startswith("_"):
            continue
        for event in events.Tensors(tag):
            value = tensor_util.make_ndarray(event.tensor_proto)
            if tag.startswith("prompts/"):
                texts[tag, event.step] = value.item().decode()
            elif tag.startswith("distributions/"):
                assert (tag, event.step) not in histograms
                histograms[tag, event.step] = value[:, 2], value[:, :2].ravel()
            else:
                scalars.append(((tag, event.step), float(value)))
    config = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content.decode("latin1")
    # The files themselves have nothing twice either, whatever a reader makes of them.
    from espl_jax.trackers.event_files import records

    seen = [
        (value.tag, event.step)
        for file in sorted((path / "tensorboard").iterdir())
        for event, _ in records(file.read_bytes())
        for value in event.summary.value
    ]
    assert len(seen) == len(set(seen))
    return Stored(scalars, histograms, texts, texts["prompts/deployed", 6], config)


def wandb(path, run_id):
    from wandb.proto import wandb_internal_pb2

    from espl_jax.trackers import wandb_files

    scalars, histograms, texts, summary, config = [], {}, {}, {}, ""
    for step, row in wandb_files.rows(path, run_id):
        for name, value in row.items():
            if name.endswith("._type") and value == "histogram":
                name = name.removesuffix("._type")
                histograms[name, step] = row[f"{name}.values"], row[f"{name}.bins"]
            elif name.endswith(".path"):
                (file,) = {each.read_text() for each in path.glob(f"wandb/*/files/{value}")}
                texts[name.removesuffix(".path"), step] = html.unescape(re.sub(r"</?pre>", "", file))
            elif isinstance(value, int | float) and not name.startswith("_") and "." not in name:
                scalars.append(((name, step), value))
    for file in sorted(path.glob(f"wandb/*run-*-{run_id}/*.wandb")):
        for data in wandb_files._records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            for item in record.summary.update:
                summary[item.key or ".".join(item.nested_key)] = item.value_json
            config += str(record.run.config)
    scalars += [((name, 6), float(value)) for name, value in summary.items() if name.startswith("test/")]
    return Stored(scalars, histograms, texts, summary["prompts/deployed"], config)


def trackio(path, run_id):
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = trackio.Api().runs("espl_test")
    assert run.name == f"run-{run_id[:6]}"
    scalars, histograms, texts = [], {}, {}
    for row in SQLiteStorage.get_logs("espl_test", run.name):
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                scalars.append(((name, row["step"]), value))
            elif name.startswith("distributions/"):
                histograms[name, row["step"]] = value["values"], value["bins"]
            elif name.startswith("prompts/"):
                texts[name, row["step"]] = value["_value"]
    return Stored(scalars, histograms, texts, texts["prompts/deployed", 6], str(run.config))


def mlflow(path, run_id):
    from mlflow import MlflowClient
    from mlflow.artifacts import load_dict, load_text

    client = MlflowClient()
    experiment = client.get_experiment_by_name("espl_test")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.tags["espl_jax.id"] == run_id and run.info.status == "FINISHED"
    scalars = [
        ((name, metric.step), metric.value)
        for name in run.data.metrics
        for metric in client.get_metric_history(run.info.run_id, name)
    ]
    histograms, texts, address = {}, {}, run.info.artifact_uri
    for i in range(1, 7):
        for name in ("distributions/reply_tokens", "distributions/reward"):
            histogram = load_dict(f"{address}/{name}/{i:08d}.json")
            histograms[name, i] = np.array(histogram["counts"]), histogram["edges"]
        for name in ("prompts/entered", "prompts/best"):
            texts[name, i] = load_text(f"{address}/{name}/{i:08d}.txt")
    deployed = load_text(f"{address}/prompts/deployed/00000006.txt")
    return Stored(scalars, histograms, texts, deployed, str(run.data.params))
