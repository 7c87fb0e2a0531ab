r"""Trains a search agent on Natural Questions and HotpotQA, the paper's fourth task.

    python -m espl_jax.main --config=configs/search.py --workdir=runs/search \
        --config.environment.search.retriever=http://localhost:8000/retrieve

`--config=configs/search.py:gpt-oss-120b` and `--config=configs/search.py:qwen3-30b-a3b` train other models;
configs/hmmt.py has their meshes.

You provide the retriever: a server that implements Search-R1's protocol (as the common Wikipedia indexes do),
or a file of passages, one JSON object per line with `title` and `text`. To run without a retriever and
without the Hub, use the generated encyclopedia, which has questions and passages:

    python -m espl_jax.main --config=configs/search.py --workdir=runs/encyclopedia --config.data=encyclopedia

For gpt-oss-120b with 196 training and 64 test questions, the paper reports 6.6% before training, 44.2% when
training only the weights (GRPO), 34.0% when evolving only the prompts, and 48.6% with both.
"""

from configs import hmmt

TEMPLATE_ARGUMENTS = {
    "qwen3-8b": '{"enable_thinking": false}',
    "qwen3-30b-a3b": '{"enable_thinking": false}',
    "gpt-oss-120b": '{"reasoning_effort": "low"}',
    "deepseek-v3.1": '{"thinking": false}',
}
"""Little or no thinking between searches, as each model's chat template has it."""


def _questions(config: str, split: str, count: int) -> str:
    options = f"config={config},split={split},answer=golden_answers,repeats=first,shuffle=0,count={count}"
    return f"hub:RUC-NLPIR/FlashRAG_datasets:{options}"


def get_config(model="qwen3-8b"):
    """Returns the settings of configs/hmmt.py for search, with half of the questions from each data set.

    Args:
      model: one of `hmmt.MODELS`.
    """
    c = hmmt.get_config(model)
    c.model.chat_template_kwargs = TEMPLATE_ARGUMENTS[model]
    c.data.train = f"{_questions('nq', 'train', 98)} + {_questions('hotpotqa', 'train', 98)}"
    c.data.test = f"{_questions('nq', 'test', 32)} + {_questions('hotpotqa', 'dev', 32)}"
    c.environment.name = "search"
    c.population.text = (
        "Answer the question. Search for what you do not know for certain, and read what was found before "
        "you search again. Where the question takes several steps, search for one step at a time."
    )
    c.sampling.max_new_tokens = 4096
    c.loss.microbatch_rows = 5
    return c
