"""Work directories of runs that never ran, for tests of the report: any size, and hostile texts."""

import json
from pathlib import Path

import numpy as np

from configs import common
from espl_jax.evolution.deployment import lower_bound
from espl_jax.rollouts.evaluation import estimate
from espl_jax.types import SystemPrompt

HOSTILE = ("<script>alert(1)</script>", "</script><img src=x onerror=alert(2)>")
"""Texts that run code if they reach a page unescaped."""

WORDS = [
    "check",
    "every",
    "step",
    "of",
    "the",
    "sum",
    "and",
    "write",
    "the",
    "answer",
    "in",
    "a",
    "box",
    "before",
    "you",
    "add",
    "units",
    "then",
    "compare",
    "carry",
    "digits",
    "from",
    "right",
    "to",
    "left",
    "state",
    "result",
    "exactly",
    "once",
    "never",
    "guess",
    "read",
    "question",
    "twice",
    "number",
    "table",
]


def write_run(
    path,
    *,
    mode="espl",
    iterations=3,
    members=4,
    prompts=3,
    problems=2,
    samples=4,
    tokens=12,
    finished=True,
    seed=0,
    hostile=False,
    token_logprobs=True,
    encode=None,
    gain=0.5,
):
    """Writes a work directory.

    Args:
      path: a new folder.
      mode: of the run; `rl` and `reflection` have as many prompts in an iteration as they would.
      iterations, members, prompts, problems, samples: how many of each; prompts and problems of an iteration.
      tokens: mean number of tokens of a reply.
      finished: whether there are results.
      seed: of everything random.
      hostile: whether a principle, a problem, a reply, feedback and a tool result are `HOSTILE`.
      token_logprobs: whether rollouts have logprobs by token, of the sampler and of the trainer.
      encode: text -> token ids; by default the ids are random.
      gain: how much the reward rises over the run.
    """
    path = Path(path)
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    evolves = mode != "rl"
    prompts, members = (prompts, members) if evolves else (1, 1)
    prompts = 1 if mode == "reflection" else prompts
    config = _config(mode, iterations, prompts, problems, samples, seed)
    _write_json(path / "config.json", config)
    family = _Family(rng, members, iterations, hostile)
    logs = {name: [] for name in ("metrics", "rollouts", "problems", "reflections", "lineage", "evaluations")}
    logs["lineage"].append({"event": "root", "at": 0, **family.json("p0")})
    for iteration in range(1, iterations + 1):
        hope = 0.2 + gain * iteration / iterations
        playing = family.choose(prompts)
        names = [f"sum-{(iteration * problems + b) % (40 * problems)}" for b in range(problems)]
        rows = _rollouts(rng, iteration, playing, names, samples, tokens, hope, token_logprobs, encode)
        if hostile:
            _spoil(rows[0], encode)
        logs["rollouts"] += rows
        logs["problems"] += [
            {
                "iteration": iteration,
                "id": name,
                "text": HOSTILE[b % 2] if hostile else f"What is {iteration} + {b}?",
                "answer": str(iteration + b),
            }
            for b, name in enumerate(names)
        ]
        means = {
            prompt: float(np.mean([row["reward"] for row in rows if row["prompt"] == prompt]))
            for prompt in playing
        }
        family.play(iteration, means)
        children = family.birth(iteration, playing) if evolves else []
        logs["lineage"] += [{"event": "born", "at": iteration, **family.json(each)} for each in children]
        logs["reflections"] += _reflections(rng, iteration, hostile) if evolves else []
        logs["metrics"].append(_metrics(iteration, rows, means, children, family, mode, iteration % 2 == 0))
    for name, records in logs.items():
        if records:
            text = "".join(json.dumps(each, sort_keys=True, separators=(",", ":")) + "\n" for each in records)
            (path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    population = {"max_size": 100, "created": members, "members": [family.json(each) for each in family.ids]}
    _write_json(path / "population.json", population)
    versions = {"python": "3.12.0", "jax": "0.9.0"}
    _write_json(
        path / "machine.json",
        {
            "versions": versions,
            "devices": {"kind": "cpu", "count": 1},
            "processes": 1,
            "peak_bytes": {"host": 3 * 2**30},
        },
    )
    if finished:
        _finish(path, rng, mode, iterations, family, gain)
    return path


def _config(mode, iterations, prompts, problems, samples, seed):
    config = common.get_config()
    with config.unlocked():
        config.mode, config.num_iterations, config.seed = mode, iterations, seed
        config.num_prompts, config.batch_size, config.group_size = prompts, problems, samples
        config.data.train = "addition:digits=2,count=1000"
    return json.loads(json.dumps(config.to_dict()))


class _Family:
    """Prompts, their ratings and who descends from whom."""

    def __init__(self, rng, members, iterations, hostile):
        self._rng = rng
        self._births = np.linspace(1, iterations, members - 1).astype(int) if members > 1 else np.array([])
        self._hostile = hostile
        self.ids = ["p0"]
        self._members = {"p0": {"text": "Reply with the sum.", "principles": [], "mu": 25.0, "sigma": 25 / 3}}
        self._members["p0"] |= {"id": "p0", "parents": [], "operator": "root", "iteration": 0}
        self._members["p0"] |= {"edits": [], "evidence": {}, "tournaments": []}

    def json(self, name):
        return json.loads(json.dumps(self._members[name]))

    def deployed(self):
        return max(
            self.ids[1:] or self.ids, key=lambda each: lower_bound(SystemPrompt(**self._members[each]))
        )

    def choose(self, count):
        return [str(each) for each in self._rng.choice(self.ids[-10:], size=count)]

    def play(self, iteration, means):
        order = sorted(means, key=lambda each: -means[each])
        for rank, name in enumerate(order):
            member = self._members[name]
            member["mu"] += float(1.5 - 3 * rank / max(len(order) - 1, 1)) / (1 + len(member["tournaments"]))
            member["sigma"] = max(1.0, member["sigma"] * 0.85)
            member["tournaments"].append(
                {
                    "iteration": iteration,
                    "value": means[name],
                    "rank": rank,
                    "players": len(order),
                    "mu": member["mu"],
                    "sigma": member["sigma"],
                }
            )

    def birth(self, iteration, playing):
        born = []
        for _ in range(int((self._births == iteration).sum())):
            name, parents = f"p{len(self.ids)}", [playing[0]]
            crossed = len(set(playing)) > 1 and self._rng.random() < 0.2
            if crossed:
                parents = list(dict.fromkeys(playing))[:2]
            first = self._members[parents[0]]
            principle = " ".join(self._rng.choice(WORDS, size=14))
            if self._hostile:
                principle = HOSTILE[len(self.ids) % 2]
            self._members[name] = first | {
                "id": name,
                "principles": [*first["principles"], principle][-8:],
                "parents": parents,
                "operator": "crossover" if crossed else "mutation",
                "iteration": iteration,
                "edits": [{"op": "add", "id": "C0", "principle": principle, "evidence": "3 attempts failed"}],
                "evidence": {"problems": ["sum-1"], "suggestions": [principle]},
                "tournaments": [],
                "sigma": first["sigma"] + 1.0,
            }
            self.ids.append(name)
            born.append(name)
        return born


def _rollouts(rng, iteration, playing, names, samples, tokens, hope, token_logprobs, encode):
    rows = []
    for slot, prompt in enumerate(playing):
        for b, problem in enumerate(names):
            for sample in range(samples):
                success = bool(rng.random() < hope - 0.1 * (b % 3))
                reply = " ".join(rng.choice(WORDS, size=max(2, int(rng.poisson(tokens)))))
                ids = (
                    encode(reply) if encode else np.minimum(rng.zipf(1.3, len(reply.split())), 4000).tolist()
                )
                logprobs = np.round(-rng.exponential(0.6, len(ids)), 4).tolist()
                row = {
                    "iteration": iteration,
                    "prompt": prompt,
                    "problem": problem,
                    "slot": slot,
                    "sample": sample,
                    "reward": float(success),
                    "success": success,
                    "truncated": bool(rng.random() < 0.05),
                    "answer": str(int(rng.integers(100))),
                    "reply": reply,
                    "feedback": "" if success else "There is no answer in a box.",
                    "environment": {},
                    "tokens": ids,
                    "logprob": sum(logprobs),
                }
                if token_logprobs:
                    row["logprobs"] = logprobs
                    row["trainer_logprobs"] = np.round(
                        np.array(logprobs) + rng.normal(0, 0.03, len(ids)), 4
                    ).tolist()
                rows.append(row)
    return rows


def _spoil(row, encode):
    """Makes a rollout a conversation in which the model and its tool write hostile texts."""
    said, told = HOSTILE
    row["reply"] = f"{said} {told}\n\n[tool]\n{told} {said}\n\n{said}"
    row["answer"] = told
    row["feedback"] = told + "w" * 3000
    row["environment"] = {told: 1.0}
    if encode:
        parts = [encode(f"{said} {told}"), encode(f"{told} {said}"), encode(said)]
        row["tokens"] = [token for part in parts for token in part]
        drawn = [i != 1 for i, part in enumerate(parts) for _ in part]
        for name in ("logprobs", "trainer_logprobs"):
            row[name] = [-0.5 if own else None for own in drawn]


def _reflections(rng, iteration, hostile):
    def text(size):
        return " ".join(rng.choice(WORDS, size=size))

    return [
        {
            "iteration": iteration,
            "operator": "mutation",
            "stage": stage,
            "conversation": [
                {"role": "system", "content": "You improve prompts."},
                {"role": "user", "content": HOSTILE[1] if hostile else text(160)},
            ],
            "reply": None if rng.random() < 0.05 else HOSTILE[0] if hostile else text(40),
            **({"ended": False} if rng.random() < 0.1 else {}),
        }
        for stage in ("summary", "summary", "critique", "critique", "revision")
    ]


def _metrics(iteration, rows, means, children, family, mode, validated):
    rewards = [row["reward"] for row in rows]
    best = family.json(family.deployed())
    rng = np.random.default_rng(iteration)
    record = {
        "iteration": iteration,
        "reward": float(np.mean(rewards)),
        "success": float(np.mean(rewards)),
        "truncated": float(np.mean([row["truncated"] for row in rows])),
        "new_tokens": float(np.mean([len(row["tokens"]) for row in rows])),
        "mixed_groups": 3,
        "groups": 6,
        "children": children,
        "no_child": {} if children else {"mutation": "no_edits"},
        "drops": {"too_long": 1, "repeat": iteration % 3},
        "skipped_updates": 0,
        "tournament": {"prompts": list(means), "values": list(means.values())},
        "best_prompt": {name: best[name] for name in ("id", "mu", "sigma")},
        "population": len(family.ids),
        "drift_sigma": 0.0,
        "reflector": {"requests": 5, "prompt_tokens": 900, "completion_tokens": 200},
        "time": {"rollouts": 20.0 + rng.random() * 5, "reflection": 6.0, "update": 4.0, "total": 34.0},
    }
    if mode in ("espl", "rl"):
        record |= {
            "entropy": 1.2 - 0.5 * iteration / 300 + 0.1 * rng.random(),
            "kl": 0.01 * iteration / 300 + 0.002 * rng.random(),
            "clip_fraction": 0.05 * rng.random(),
            "log_ratio_abs": 0.01 + 0.004 * rng.random(),
            "grad_norm": 0.3 + 0.2 * rng.random(),
            "trained_tokens": 1000,
        }
    if validated:
        value = min(0.95, record["reward"] + 0.1 * rng.random())
        record["validation"] = {
            "accuracy": value,
            "low": max(0, value - 0.1),
            "high": min(1, value + 0.1),
            "pass_at": {"1": value, "4": min(1, value + 0.2)},
        }
    return record


def _finish(path, rng, mode, iterations, family, gain):
    deployed = family.deployed() if mode != "rl" else "p0"
    weights = ["initial", "trained"] if mode in ("espl", "rl") else ["initial"]
    names = {"root": "p0"} | ({"deployed": deployed} if deployed != "p0" else {})
    cells, lines = {}, []
    for i, weight in enumerate(weights):
        for j, (role, prompt) in enumerate(names.items()):
            success = rng.random((50, 4)) < 0.15 + gain * (0.5 * i + 0.5 * j)
            result = estimate(success.astype(np.float32), success)
            cells.setdefault(weight, {})[role] = json.loads(json.dumps(vars(result)))
            lines += [
                {
                    "iteration": iterations,
                    "split": "test",
                    "weights": weight,
                    "prompt": prompt,
                    "problem": f"test-{b}",
                    "sample": n,
                    "success": bool(success[b, n]),
                    "reward": float(success[b, n]),
                    "tokens": [1, 2, 3],
                }
                for b, n in np.ndindex(*success.shape)
            ]
    results = {
        "iteration": iterations,
        "deployed": family.json(deployed),
        "reason": "highest mu - 2 sigma",
        "test": cells,
    }
    _write_json(path / "results.json", results)
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    (path / "evaluations.jsonl").write_text(text, encoding="utf-8")


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=2, sort_keys=True), encoding="utf-8")
