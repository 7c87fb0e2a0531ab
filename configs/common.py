"""Every field of a run once, with its default and one comment. A run's file changes what it needs to.

Fields are set on the command line too: `--config.optimizer.learning_rate=1e-4`. A `placeholder` is None until
it is given a value of its type.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """The defaults, which are the paper's settings where it gives them."""
    c = ConfigDict()
    c.mode = "espl"  # espl (both), rl (weights only), evolution (prompts only), reflection (mutation alone)
    c.seed = 0  # of everything drawn: problems, selection, tokens, adapters
    c.num_iterations = 30  # policy-gradient steps, and generations of prompts

    c.model = ConfigDict()
    c.model.source = "smollm2"  # or qwen2.5-coder-0.5b, a .gguf file, a safetensors folder, org/name (hub)
    # Each "auto" becomes what suits the machine; the values are recorded, and a resumed run keeps them.
    c.model.dtype = "auto"  # KV cache and operands of products: float32 or bfloat16
    c.model.param_dtype = "auto"  # how frozen weights are stored; trained ones are float32 always
    c.model.matmul_precision = (
        "auto"  # default (as dtype), highest, or bfloat16 (operands of float32 products)
    )
    c.model.sampling_layout = "auto"  # stacked (all layers in one array) or unstacked (faster on CPUs)
    c.model.scan_layers = True  # one program for all layers, or one for each
    c.model.remat = "full"  # or none, attention, products, rounded, offload; see models/config.py
    c.model.chat_template_kwargs = "{}"  # JSON, passed to the chat template: {"enable_thinking": false}

    c.lora = ConfigDict()
    c.lora.rank = 32  # of the adapters; 0 trains all weights
    c.lora.targets = ("query", "key", "value", "out", "gate", "up", "down")  # adapted weights; also: head
    c.lora.scale = 1.0  # alpha / rank

    c.data = ConfigDict()
    c.data.train = ""  # .jsonl or .parquet file, hub:org/name:split=train, or addition:digits=2,count=200
    c.data.validation = ""  # likewise; empty holds out validation_count problems of train
    c.data.test = ""  # likewise; empty means that there is no test
    c.data.validation_count = 10  # problems held out of train where data.validation is empty
    c.data.too_long = "refuse"  # problems that leave no room in the context: refuse, or drop (and count)
    c.data.fields = ConfigDict()  # names of fields of all sources whose spec does not name them
    c.data.fields.text = ""  # the statement's, e.g. prompt.0.content; empty finds problem or question
    c.data.fields.answer = ""  # the answer's; empty finds answer
    c.data.fields.id = ""  # the id's; empty finds id, or hashes the statement

    c.environment = ConfigDict()
    c.environment.name = "math"  # math (math-verify), arithmetic (a number), search, or module:name
    c.environment.answer_format = "boxed"  # boxed; math also: expression; arithmetic also: last_number
    c.environment.instruction = placeholder(str)  # after each problem; None asks for a box if one is needed
    c.environment.show_thinking = False  # let grader and reflection see thinking blocks too
    c.environment.reward = ""  # module:function of problem, reply and grade, instead of its own
    c.environment.options = "{}"  # JSON, arguments of an environment given as module:name
    c.environment.tool_format = "auto"  # how calls are written: hermes, xml, mistral, llama, or by template
    c.environment.math = ConfigDict()
    c.environment.math.timeout = 5.0  # seconds for one answer, which is wrong if it takes longer to compare
    c.environment.math.workers = 2  # processes that compare answers
    c.environment.math.memory_mib = 512  # MiB of address space for one answer
    c.environment.search = ConfigDict()
    c.environment.search.retriever = ""  # http://host:port/retrieve, or .jsonl; encyclopedia has its own
    c.environment.search.passages = 3  # found for each query
    c.environment.search.max_turns = 4  # of the model's, the answer included
    c.environment.search.max_passage_words = 150  # longer passages are cut
    c.environment.search.timeout = 30.0  # seconds for one call, after which the model is told that it failed
    c.environment.search.concurrency = 16  # calls at once
    c.environment.search.rewards = ConfigDict()  # weights of what a reward is the sum of
    c.environment.search.rewards.exact_match = 1.0  # 1 for the right answer
    c.environment.search.rewards.f1 = 0.0  # of the answer's words
    c.environment.search.rewards.answered = 0.0  # 1 for an answer of any kind
    c.environment.search.rewards.searched = 0.0  # 1 for a search that found something
    c.environment.search.rewards.malformed_calls = 0.0  # for each
    c.environment.search.rewards.failed_searches = 0.0  # for each

    c.population = ConfigDict()
    c.population.text = ""  # prose of the root prompt
    c.population.principles = ()  # principles of the root prompt; empty for the math tasks of the paper
    c.population.start_from = ""  # a population.json, or first prompts of your own in a .jsonl, instead
    c.population.max_size = 100  # members alive; the oldest leave first

    c.num_prompts = 3  # M, system prompts side by side in one iteration
    c.batch_size = 10  # B, problems in one iteration
    c.group_size = 5  # N, rollouts of each prompt on each problem

    c.sampling = ConfigDict()
    c.sampling.temperature = 0.7  # of rollouts
    c.sampling.max_new_tokens = 15_000  # of one rollout, all turns and what tools say included
    c.sampling.top_k = 0  # draw from so many most likely tokens only; 0 for all
    c.sampling.top_p = 1.0  # then from the fewest that hold so much of the probability; 1 for all
    c.sampling.min_p = 0.0  # then from those at least so likely, relative to the likeliest; 0 for all
    c.sampling.stop_strings = ()  # texts that end a rollout, wherever tokens begin and end
    c.sampling.context_limit = 0  # most tokens of a whole conversation; 0 for the model's own limit
    c.sampling.max_rows = 0  # times M: rollouts in flight at once; 0 for as many as fit into memory

    c.selection = ConfigDict()
    c.selection.strategy = "softmax"  # softmax (the paper's equation 4), uniform, ucb or lucb
    c.selection.window = 10  # K, only so many newest members can be selected
    c.selection.optimism = 2.0  # lambda, score = mu + lambda * sigma
    c.selection.temperature = placeholder(float)  # of the softmax; None for the largest score, at least 1

    c.ratings = ConfigDict()
    c.ratings.system = "trueskill"  # trueskill, or openskill (no patents)
    c.ratings.tie_margin = 0.01  # mean rewards this close tie, and win nothing in a crossover
    c.ratings.drift_sigma = 0.0  # what every uncertainty grows by when the weights have moved

    c.evolution = ConfigDict()
    c.evolution.form = "principles"  # what is edited: principles (a list) or prose (its sentences)
    c.evolution.output = "edits"  # what mutations propose: edits, or rewrite (the whole prompt, in one stage)
    c.evolution.mutation_sigma = 1.0  # what a mutated child's uncertainty grows by
    c.evolution.crossover_sigma = 1.0  # likewise for crossover
    c.evolution.crossover_prob = 0.2  # chance of a crossover in an iteration
    c.evolution.max_edits = 2  # K_ops, edits that one critique may propose
    c.evolution.max_words = 32  # of one principle; asked for, asked for again, then refused
    c.evolution.word_retries = 1  # times that a reply with too long a principle is asked for again
    c.evolution.max_principles = 32  # of one prompt; edits that would make more are refused
    c.evolution.max_prompt_tokens = 4096  # of one prompt; likewise, or what the context leaves
    c.evolution.copied_tokens = 12  # edits with such a run of a training problem are refused; 0 allows all
    c.evolution.copied_answers = True  # refuse edits that hold an answer of the iteration's problems
    c.evolution.copied_templates = True  # refuse edits that echo the reflector's own instructions
    c.evolution.copied_members = True  # refuse mutations that repeat another member's principle
    c.evolution.allow_duplicates = False  # let children enter that equal a living member

    c.deployment = ConfigDict()
    c.deployment.rule = "ratings"  # ratings (best mu - 2 sigma), newest, or validation (best mean reward)
    c.deployment.min_tournaments = 2  # ratings: only members with so many count
    c.deployment.candidates = 5  # validation: so many members are tried

    c.reflection = ConfigDict()
    c.reflection.reflector = "local"  # local (on device), openai (any compatible server) or replay (a record)
    c.reflection.policy = "reference"  # local: reference (initial weights) or current (before the update)
    c.reflection.source = ""  # local: another model as the reflector, as model.source; empty for the policy
    c.reflection.chat_template_kwargs = "{}"  # JSON, passed to that model's chat template
    c.reflection.problems = (
        "mixed_or_failed"  # reflected on: mixed, failed, mixed_or_failed (see docs) or all
    )
    c.reflection.max_problems = 0  # problems of one mutation, drawn at random; 0 for all
    c.reflection.max_attempts = (
        0  # attempts shown per problem, drawn at random, half of them right; 0 for all
    )
    c.reflection.show = ("summary", "verdict", "gold", "feedback")  # of an attempt; also: trajectory
    c.reflection.verbatim_chars = 2000  # attempts shorter than this are shown as they are, not summarized
    c.reflection.rejected_edits = 8  # recently rejected edits shown to the reflector
    c.reflection.stages = 3  # 3 (summaries, critiques, revision) or 1 (one call for all problems)
    c.reflection.reasoning = "none"  # before edits: none, brief (free text), or model (its thinking block)
    c.reflection.reasoning_tokens = 512  # of reasoning before one reply; longer reasoning gives no edit
    c.reflection.format = "auto"  # how edits are written: lines, json, or auto (json for openai)
    c.reflection.templates = ""  # folder of templates that replace built-in ones of the same name
    c.reflection.constrained = True  # keep edits to their grammar: while decoding, or by the server
    c.reflection.temperature = 0.7  # of summaries, critiques and revisions
    c.reflection.max_new_tokens = 2048  # of one reply
    c.reflection.max_input_tokens = 32_768  # local: longer conversations are cut in the middle
    c.reflection.opening = False  # local: write the beginning of free replies for the model
    c.reflection.base_url = "https://api.openai.com/v1"  # of the server
    c.reflection.model = ""  # what the server calls its model
    c.reflection.api_key_variable = "OPENAI_API_KEY"  # environment variable with the key; may be unset
    c.reflection.concurrency = 8  # requests at once
    c.reflection.timeout = 300.0  # seconds for one attempt at a request
    c.reflection.max_retries = 5  # of a request that fails; after that its reply is missing
    c.reflection.price_input = 0.0  # of a million tokens, for the metric `cost`
    c.reflection.price_output = 0.0  # likewise
    c.reflection.replay = ""  # the reflections.jsonl or replies.jsonl that `replay` answers from

    c.loss = ConfigDict()
    # The ratio of importance_sampling is policy / sampler, that of the other kinds policy / old policy: the
    # trainer's own logprobs before the batch's first update, so the ratio is 1 in that update.
    c.loss.kind = "importance_sampling"  # or sequence_importance_sampling, ppo, cispo, gspo
    c.loss.clip_low = placeholder(float)  # ratios are kept above 1 - clip_low; None for the kind's own
    c.loss.clip_high = placeholder(float)  # ratios are kept below 1 + clip_high; None for the kind's own
    c.loss.aggregation = "seq_mean_token_sum"  # or token_mean, or constant_length (sampling.max_new_tokens)
    c.loss.baseline = "per_prompt"  # per_prompt or marginalized (over prompts too)
    c.loss.normalize_advantages = "none"  # none, std (of what the baseline is the mean of) or batch_std
    c.loss.sampler_weight_cap = 0.0  # largest weight old policy / sampler of a term; 0 for no weights
    c.loss.epochs = 1  # passes over a batch
    c.loss.minibatches = 1  # parts of a batch, one update each
    c.loss.kl_coef = 0.0  # weight of KL(policy || reference)
    c.loss.kl_estimator = "exact"  # exact (whole vocabulary), or k2, k3 (tokens drawn, weighted)
    c.loss.mask_truncated = False  # no gradient from rollouts that a limit ended (DAPO's overlong filtering)
    c.loss.microbatch_rows = 0  # rollouts at a time in the backward pass; 0 for all at once

    c.optimizer = ConfigDict()
    c.optimizer.kind = "adam"  # adam, adamw (with weight decay) or adafactor (with little state)
    c.optimizer.learning_rate = 4e-5  # after the warm-up
    c.optimizer.b1 = 0.9  # decay of the gradients' mean; of Adam and AdamW
    c.optimizer.b2 = 0.95  # decay of their squares' mean; likewise
    c.optimizer.eps = 1e-8  # Adam's epsilon; likewise
    c.optimizer.weight_decay = 0.0  # adamw: the learning rate times this is taken off matrices in each update
    c.optimizer.max_grad_norm = 1.0  # gradients are clipped to this norm; 0 leaves them alone
    c.optimizer.schedule = "constant"  # constant, linear or cosine: the rate from the warm-up to the end
    c.optimizer.warmup_steps = 0  # updates of linear warm-up
    c.optimizer.final_rate = 0.0  # linear, cosine: where the rate ends, as a part of learning_rate
    c.optimizer.max_skipped = 3  # updates in a row skipped for a NaN or infinity, before the run stops

    c.evaluation = ConfigDict()
    c.evaluation.every = 5  # iterations between evaluations on validation; 0 for none
    c.evaluation.validation_samples = 1  # rollouts of each validation problem
    c.evaluation.test_samples = 10  # rollouts of each test problem, at the end
    c.evaluation.temperature = 0.7  # of evaluation

    c.mesh = ConfigDict()
    c.mesh.data = 1  # devices that share rows; one of the four may be -1 and takes the rest
    c.mesh.fsdp = -1  # devices that share rows and weights
    c.mesh.tensor = 1  # devices that share heads
    c.mesh.expert = 1  # devices that share the experts of a mixture; of other models, rows

    c.resume = ConfigDict()
    c.resume.changed_inputs = "refuse"  # refuse or allow (and log): files replaced since the run's checkpoint

    c.checkpoint_every = 1  # iterations between checkpoints
    c.checkpoint_keep = 2  # checkpoints kept
    c.compilation_cache = "~/.cache/espl_jax/xla"  # compiled programs, kept between runs; empty for none
    c.profile_iteration = 0  # iteration to write a profile of, to <workdir>/profile; 0 for none
    return c.lock()  # a run's file that sets a field by a wrong name is refused
