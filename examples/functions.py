"""Uses the functions without the training loop: rollouts of a prefix tree, rewards, ratings and a loss.

python examples/functions.py
"""

import jax
import jax.numpy as jnp
import numpy as np

import espl_jax
from espl_jax.evolution.population import start

# Host: system prompts, their ratings, and edits parsed from a model's reply.
text = 'Sure! Here they are: [{"op": "add", "principle": "Give the name alone."},]'
edits, drops = espl_jax.parse_edits(text)
root = espl_jax.SystemPrompt(text="Answer the question.")
population = start([root, espl_jax.apply_edits(root, edits)], max_size=10)
prompts = espl_jax.select(population, 2, "softmax", np.random.default_rng(0))

# Device: sample a tree (2 system prompts x 2 problems x 4 rollouts) and grade it.
model = espl_jax.load_pretrained("smollm2", param_dtype="bfloat16", matmul_precision="bfloat16")


def tokens(prompt, problem):
    """Returns the tokens of a conversation up to the model's turn."""
    messages = [{"role": "system", "content": prompt.render()}, {"role": "user", "content": problem}]
    return model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


problems = ["What is the capital of France?", "What is the capital of Japan?"]
tree = [[tokens(prompt, problem) for problem in problems] for prompt in prompts]
samples = espl_jax.generate(
    model.params, model.config, tree, key=jax.random.key(0), group_size=4, max_new_tokens=8
)
replies = [[[model.tokenizer.decode(row) for row in group] for group in slot] for slot in samples.tokens]
answers = ["Paris", "Tokyo"]
rewards = np.array(
    [
        [[answer in reply for reply in group] for answer, group in zip(answers, slot, strict=True)]
        for slot in replies
    ]
)
advantages = espl_jax.advantages(rewards)  # [2, 2, 4]
population = espl_jax.rate(population, [p.id for p in prompts], rewards.mean(axis=(1, 2)))

# The policy-gradient loss of one rollout.
sequence = jnp.array([tree[0][0] + samples.tokens[0, 0, 0].tolist()])
logprobs = espl_jax.token_logprobs(model.params, model.config, sequence)[:, -8:]
mask = jnp.arange(8)[None] < samples.lengths[0, 0, 0]
loss_sum, count, metrics = espl_jax.policy_gradient_loss(
    logprobs, jnp.array(samples.logprobs[0, 0, :1]), advantages[0, 0, :1], mask
)
print(f"mean reward {rewards.mean():.2f}, loss {loss_sum / count:.4f} over {int(count)} rollouts or tokens")
