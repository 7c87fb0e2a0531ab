r"""An agent that searches: questions of Natural Questions and HotpotQA, the paper's fourth data pair.

    python -m espl_jax.main --config=configs/search.py --workdir=runs/search \
        --config.environment.search.retriever=http://localhost:8000/retrieve

The retriever is yours: a server that speaks Search-R1's protocol (which is how indexes of all of Wikipedia
are run), or a file of passages, one JSON object a line with `title` and `text`. Without either, and without
the hub, a generated encyclopedia has questions and passages:

    python -m espl_jax.main --config=configs/search.py --workdir=runs/encyclopedia --config.data=encyclopedia

The paper reports 6.6% before training, 44.2% with weights alone (GRPO), 34.0% with prompts alone and 48.6%
with both, for gpt-oss-120b on 196 training and 64 test questions.
"""

from configs import hmmt


def _questions(config: str, split: str, count: int) -> str:
    options = f"config={config},split={split},answer=golden_answers,repeats=first,shuffle=0,count={count}"
    return f"hub:RUC-NLPIR/FlashRAG_datasets:{options}"


def get_config():
    """The settings of configs/hmmt.py; half of the questions from each set, chosen by a seed."""
    c = hmmt.get_config()
    c.model.chat_template_kwargs = '{"enable_thinking": false}'
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
