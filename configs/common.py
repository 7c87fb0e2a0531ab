"""All configuration fields, with defaults. Each run has a short config file that overrides some of them.

The command line overrides fields too: `--config.optimizer.learning_rate=1e-4`. A `placeholder` is None by
default and takes a value of its type.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """Returns the defaults: the paper's settings where the paper gives them."""
    c = ConfigDict()
    c.mode = "espl"  # espl (weights and prompts), rl (weights), evolution (prompts) or reflection (mutations)
    c.seed = 0  # seeds problem order, selection, sampling and adapter initialization
    c.num_iterations = 30  # one update of the weights and one generation of prompts each

    c.model = ConfigDict()
    c.model.source = "smollm2"  # or qwen2.5-coder-0.5b, a .gguf file, a safetensors folder, org/name (Hub)
    # "auto" is resolved for the machine. The resolved values are recorded, and a resumed run keeps them.
    c.model.dtype = "auto"  # dtype of the KV cache and of matmul operands: float32 or bfloat16
    c.model.param_dtype = "auto"  # dtype of frozen weights: float32, bfloat16, int8; trained ones are float32
    c.model.matmul_precision = (
        "auto"  # default (follows dtype), highest, or bfloat16 (rounds matmul operands)
    )
    c.model.sampling_layout = "auto"  # stacked (one array for all layers) or unstacked (faster on CPUs)
    c.model.scan_layers = True  # scan over layers (small programs); False unrolls them
    c.model.remat = "full"  # full, none, attention, products, rounded or offload; see models/config.py
    c.model.chat_template_kwargs = "{}"  # JSON arguments of the chat template: {"enable_thinking": false}

    c.lora = ConfigDict()
    c.lora.rank = 32  # adapter rank; 0 trains all weights
    c.lora.targets = ("query", "key", "value", "out", "gate", "up", "down")  # adapted; also: head, router
    c.lora.scale = 1.0  # alpha / rank

    c.data = ConfigDict()
    c.data.train = ""  # .jsonl or .parquet file, hub:org/name:split=train, or a generated set: docs/tasks.md
    c.data.validation = ""  # same formats; empty: hold out validation_count problems of train
    c.data.test = ""  # same formats; empty: no test
    c.data.validation_count = 10  # problems held out of train if data.validation is empty
    c.data.too_long = "refuse"  # problems that do not fit into the context: refuse, or drop (and report)
    c.data.fields = ConfigDict()  # field names, for sources whose spec does not give them
    c.data.fields.text = ""  # field of the statement, e.g. prompt.0.content; empty: problem or question
    c.data.fields.answer = ""  # field of the answer; empty: answer
    c.data.fields.id = ""  # field of the id; empty: id if there is one, else a hash of the statement

    c.environment = ConfigDict()
    c.environment.name = "math"  # math (math-verify), arithmetic, reasoning_gym, search, or module:name
    c.environment.answer_format = (
        "boxed"  # boxed; math also: expression; arithmetic: last_number; reasoning_gym: tag, last_line
    )
    c.environment.instruction = placeholder(str)  # appended to each problem; None: ask for a box if needed
    c.environment.show_thinking = False  # show thinking blocks to the grader and the reflector
    c.environment.reward = ""  # module:function of (problem, reply, grade) that replaces the reward
    c.environment.options = "{}"  # JSON arguments of arithmetic, reasoning_gym or a module:name environment
    c.environment.tool_format = "auto"  # call syntax: hermes, xml, mistral, llama, harmony; auto: by template
    c.environment.math = ConfigDict()
    c.environment.math.timeout = 5.0  # seconds to compare one answer; slower answers count as wrong
    c.environment.math.workers = 2  # grading processes
    c.environment.math.memory_mib = 512  # address space per answer, in MiB
    c.environment.search = ConfigDict()
    c.environment.search.retriever = ""  # http://host:port/retrieve or .jsonl; not needed for encyclopedia
    c.environment.search.passages = 3  # passages returned per query
    c.environment.search.max_turns = 4  # model turns per rollout, including the answer
    c.environment.search.max_passage_words = 150  # longer passages are cut
    c.environment.search.timeout = 30.0  # seconds per call; after that the model is told that the call failed
    c.environment.search.concurrency = 16  # concurrent calls
    c.environment.search.rewards = ConfigDict()  # the reward is the weighted sum of these terms
    c.environment.search.rewards.exact_match = 1.0  # 1 for a correct answer
    c.environment.search.rewards.f1 = 0.0  # word-level F1 of the answer
    c.environment.search.rewards.answered = 0.0  # 1 for any answer
    c.environment.search.rewards.searched = 0.0  # 1 if at least one search found something
    c.environment.search.rewards.malformed_calls = 0.0  # per malformed call
    c.environment.search.rewards.failed_searches = 0.0  # per failed search

    c.population = ConfigDict()
    c.population.text = ""  # prose of the root prompt
    c.population.principles = ()  # principles of the root prompt; empty for the paper's math tasks
    c.population.start_from = ""  # population.json, or a .jsonl of initial prompts; replaces the root prompt
    c.population.max_size = 100  # living members; the oldest are removed first

    c.num_prompts = 3  # M, system prompts per iteration
    c.batch_size = 10  # B, problems per iteration
    c.group_size = 5  # N, rollouts per prompt and problem

    c.sampling = ConfigDict()
    c.sampling.temperature = 0.7  # temperature of training rollouts
    c.sampling.max_new_tokens = 15_000  # per rollout, over all turns, including tool output
    c.sampling.top_k = 0  # sample from the k most likely tokens; 0 disables
    c.sampling.top_p = 1.0  # then from the smallest set with this much of their probability; 1 disables
    c.sampling.min_p = 0.0  # then from tokens with at least this ratio to the top probability; 0 disables
    c.sampling.stop_strings = ()  # strings that end a rollout, regardless of token boundaries
    c.sampling.context_limit = 0  # tokens per conversation; 0: the model's limit
    c.sampling.draft_tokens = 0  # most tokens drafted per decode step, which draw the same faster; 0: none
    c.sampling.cache_dtype = "same"  # dtype of cached keys and values: same (model.dtype), or int8
    c.sampling.max_rows = 0  # concurrent rollouts are at most M times this; 0: limited by memory

    c.selection = ConfigDict()
    c.selection.strategy = "softmax"  # softmax (equation 4 of the paper), uniform, ucb or lucb
    c.selection.window = 10  # K, selection considers only the K newest members
    c.selection.optimism = 2.0  # lambda in score = mu + lambda * sigma
    c.selection.temperature = placeholder(float)  # softmax temperature; None: max(1, highest score)

    c.ratings = ConfigDict()
    c.ratings.system = "trueskill"  # trueskill, or openskill (patent-free)
    c.ratings.tie_margin = 0.01  # mean rewards this close are a tie, and win nothing in a crossover
    c.ratings.drift_sigma = 0.0  # added to every sigma (in quadrature) after an update of the weights

    c.evolution = ConfigDict()
    c.evolution.form = "principles"  # what edits change: principles (a list) or prose (its sentences)
    c.evolution.output = "edits"  # what mutations propose: edits, or rewrite (whole prompts; needs stages=1)
    c.evolution.mutation_sigma = 1.0  # added to sigma (in quadrature) of a mutated child
    c.evolution.crossover_sigma = 1.0  # the same for crossover
    c.evolution.crossover_prob = 0.2  # probability of a crossover per iteration
    c.evolution.max_edits = 2  # K_ops, edits per critique
    c.evolution.max_words = 32  # words per principle: requested, requested again, then dropped
    c.evolution.word_retries = 1  # retries for a reply whose principle is too long
    c.evolution.max_principles = 32  # per prompt; edits that would exceed it are dropped
    c.evolution.max_prompt_tokens = 4096  # per prompt; likewise; lowered if the context is too small
    c.evolution.copied_tokens = 12  # drop edits that share n-grams this long with training problems; 0: off
    c.evolution.copied_answers = True  # drop edits that contain an answer of the iteration's problems
    c.evolution.copied_templates = True  # drop edits that echo the reflector's instructions
    c.evolution.copied_members = True  # drop mutations that repeat a principle of another member
    c.evolution.allow_duplicates = False  # admit children identical to a living member

    c.deployment = ConfigDict()
    c.deployment.rule = "ratings"  # ratings (max mu - 2 sigma), newest, or validation (max mean reward)
    c.deployment.min_tournaments = 2  # ratings: members with fewer tournaments are not considered
    c.deployment.candidates = 5  # validation: number of members to evaluate

    c.reflection = ConfigDict()
    c.reflection.reflector = "local"  # local (on device), openai (a compatible server) or replay (a log)
    c.reflection.policy = "reference"  # local: reference (initial weights) or current (before the update)
    c.reflection.source = ""  # local: another model as the reflector, as in model.source; empty: the policy
    c.reflection.chat_template_kwargs = "{}"  # JSON arguments of that model's chat template
    c.reflection.problems = "mixed_or_failed"  # problems to reflect on: mixed, failed, mixed_or_failed or all
    c.reflection.max_problems = 0  # problems per mutation, drawn at random; 0: all
    c.reflection.max_attempts = 0  # attempts shown per problem, drawn at random, half of them right; 0: all
    c.reflection.show = ("task", "summary", "verdict", "gold", "feedback")  # or trajectory; see docs
    c.reflection.verbatim_chars = 2000  # attempts shorter than this are shown verbatim instead of summarized
    c.reflection.rejected_edits = 8  # recently rejected edits to show
    c.reflection.stages = 3  # 3 (summaries, critiques, revision) or 1 (one call for all problems)
    c.reflection.reasoning = "none"  # before edits: none, brief (free text) or model (its thinking block)
    c.reflection.reasoning_tokens = 512  # limit of reasoning per reply; longer reasoning gives no edit
    c.reflection.format = "auto"  # format of edits: lines, json, or auto (lines for local, else json)
    c.reflection.templates = ""  # folder of templates that replace built-in ones of the same name
    c.reflection.constrained = True  # grammars for edits: constrained decoding, or JSON schemas for a server
    c.reflection.temperature = 0.7  # temperature of summaries, critiques and revisions
    c.reflection.max_new_tokens = 2048  # per reply
    c.reflection.max_input_tokens = 32_768  # local: longer conversations are cut in the middle
    c.reflection.opening = False  # local: prefill the beginning of unconstrained replies
    c.reflection.base_url = "https://api.openai.com/v1"  # openai: server address
    c.reflection.model = ""  # openai: model name on the server
    c.reflection.api_key_variable = "OPENAI_API_KEY"  # environment variable that holds the key; may be unset
    c.reflection.concurrency = 8  # concurrent requests
    c.reflection.timeout = 300.0  # seconds per attempt
    c.reflection.max_retries = 5  # retries per request; after that the reply is missing
    c.reflection.price_input = 0.0  # price of a million input tokens, for the metric `cost`
    c.reflection.price_output = 0.0  # price of a million output tokens
    c.reflection.replay = ""  # replay: a reflections.jsonl or replies.jsonl

    c.loss = ConfigDict()
    # Importance ratios are policy / sampler for importance_sampling, and policy / old policy for the other
    # kinds. The old policy is the trainer's before the batch's first update, so that update has ratio 1.
    c.loss.kind = "importance_sampling"  # or sequence_importance_sampling, ppo, cispo, gspo
    c.loss.clip_low = placeholder(float)  # ratios are clipped below 1 - clip_low; None: default of the kind
    c.loss.clip_high = placeholder(float)  # ratios are clipped above 1 + clip_high; None: default of the kind
    c.loss.aggregation = "seq_mean_token_sum"  # or token_mean, or constant_length (divides by max_new_tokens)
    c.loss.baseline = "per_prompt"  # per_prompt, or marginalized (mean over prompts as well)
    c.loss.normalize_advantages = "none"  # none, std (over the baseline's rewards) or batch_std (over all)
    c.loss.sampler_weight_cap = 0.0  # cap on the importance weight old policy / sampler; 0: no weights
    c.loss.sampler_routing = "compare"  # sampler's choices of experts: compare, replay or ignore
    c.loss.epochs = 1  # passes over each batch
    c.loss.minibatches = 1  # minibatches per epoch, one update each
    c.loss.kl_coef = 0.0  # weight of KL(policy || reference)
    c.loss.kl_estimator = "exact"  # exact (full vocabulary), or k2, k3 (sampled tokens, importance-weighted)
    c.loss.mask_truncated = False  # no gradient from truncated rollouts (DAPO's overlong filtering)
    c.loss.microbatch_rows = 0  # rollouts per microbatch of gradient accumulation; 0: all

    c.optimizer = ConfigDict()
    c.optimizer.kind = "adam"  # adam, adamw or adafactor (low memory)
    c.optimizer.learning_rate = 4e-5  # peak, after warm-up
    c.optimizer.b1 = 0.9  # adam, adamw: decay of the first moment
    c.optimizer.b2 = 0.95  # adam, adamw: decay of the second moment
    c.optimizer.eps = 1e-8  # adam, adamw: epsilon
    c.optimizer.weight_decay = 0.0  # adamw: decoupled weight decay of matrices
    c.optimizer.max_grad_norm = 1.0  # global gradient norm for clipping; 0 disables
    c.optimizer.schedule = "constant"  # constant, linear or cosine decay after warm-up
    c.optimizer.warmup_steps = 0  # updates of linear warm-up
    c.optimizer.final_rate = 0.0  # linear, cosine: final rate as a fraction of learning_rate
    c.optimizer.max_skipped = 3  # consecutive non-finite updates to skip before the run stops

    c.evaluation = ConfigDict()
    c.evaluation.every = 5  # iterations between evaluations on validation; 0 disables
    c.evaluation.validation_samples = 1  # rollouts per validation problem
    c.evaluation.test_samples = 10  # rollouts per test problem, at the end of the run
    c.evaluation.temperature = 0.7  # sampling temperature of evaluations

    c.mesh = ConfigDict()
    c.mesh.data = 1  # data parallelism; one of the four axes may be -1: all remaining devices
    c.mesh.fsdp = -1  # fully sharded data parallelism
    c.mesh.tensor = 1  # tensor parallelism
    c.mesh.expert = 1  # expert parallelism; splits the experts of a mixture; rows are data parallel

    c.trackers = ()  # any of tensorboard, wandb, trackio, mlflow: docs/trackers.md
    c.tracking = ConfigDict()
    c.tracking.project = "espl_jax"  # project of wandb and trackio, experiment of mlflow
    c.tracking.name = ""  # name of the run; empty: the name of the work directory

    c.resume = ConfigDict()
    c.resume.changed_inputs = "refuse"  # inputs replaced since the checkpoint: refuse, or allow (and warn)

    c.logs = ConfigDict()
    c.logs.token_logprobs = True  # log the sampler's logprob of every token in rollouts.jsonl
    c.logs.trainer_logprobs = (
        False  # and the trainer's before the update, for importance ratios; one more pass
    )

    c.report = ConfigDict()
    c.report.every = 0  # iterations between reports of a running run (report.html); 0: at its end only

    c.checkpoint_every = 1  # iterations between checkpoints
    c.checkpoint_keep = 2  # checkpoints to keep
    c.compilation_cache = "~/.cache/espl_jax/xla"  # persistent compilation cache; empty disables
    c.compile_ahead = "auto"  # compile the programs of rollouts in the background: auto (not on CPU), on, off
    c.profile_iteration = 0  # iteration to profile, into <workdir>/profile; 0 disables
    return c.lock()  # setting a field that does not exist is an error
