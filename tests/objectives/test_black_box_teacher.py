"""PbKD against a teacher that is nothing but a file of its answers.

No teacher weights, no teacher log-probs, no frozen trunk: demonstrations and labelled
pairs are records of text, the reward player's trunk is a copy of the student's start,
and everything goes through the pipeline, the objectives and the update as they are.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from rkd_jax.data.pipeline import ZippedBatches, make_batches
from rkd_jax.data.records import DemonstrationRecord
from rkd_jax.data.tokenize import TokenizeConfig
from rkd_jax.data.tokenizer import Tokenizer
from rkd_jax.losses import bradley_terry
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.models.heads import TOKEN_HEAD, RewardModel
from rkd_jax.models.sampling import SamplingConfig, make_sampler
from rkd_jax.objectives.pbkd import make_pbkd
from rkd_jax.objectives.reward_model import make_reward_model, pair_returns
from rkd_jax.signals.oracles import label_preferences
from rkd_jax.training.state import init_state, step_keys
from rkd_jax.training.update import make_update
from rkd_jax.types import GameBatch, GameSignal, PreferenceSignal
from tests.models.reference import random_params

WORDS = {"</s>": 0, "a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 6, "z": 7}
ROWS = TokenizeConfig(max_prompt=2, max_response=4)
STUDENT = Decoder(
    DecoderConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=16,
        max_length=8,
    )
)
REWARD = RewardModel(STUDENT, TOKEN_HEAD)
# What the black box answered, and nothing else is known of it: always a "z".
CORPUS = [
    DemonstrationRecord(f"{x} {y}", answer)
    for x, answers in zip("abcd", ("z e f", "e z f", "f z", "z z e"), strict=True)
    for y, answer in zip("efa", (answers, "z f z", "b z e"), strict=True)
]
SAMPLES, STEPS = 8, 24


def word_tokenizer():
    backend = Backend(models.WordLevel(WORDS, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, eos_token="</s>")


TOKENIZER = word_tokenizer()
ROLL_OUT = make_sampler(
    STUDENT, SamplingConfig(4, eos_ids=(0,), samples_per_prompt=SAMPLES)
)


def batches_of(records):
    return make_batches(records, TOKENIZER, ROWS, batch_size=len(CORPUS), seed=0)


def planted(prompts, responses):
    """The oracle: how many "z" an answer has."""
    del prompts
    return [float(text.split().count("z")) for text in responses]


def labelled_pairs(params):
    """The teacher's answer against the student's own, as texts with labels."""
    batch = next(batches_of(CORPUS))
    samples = ROLL_OUT(params, batch.sequences.prompts, jax.random.key(7)).sequences
    targets, kept = np.asarray(samples.targets), np.asarray(samples.response_mask)
    kept = kept & (targets != WORDS["</s>"])
    duels = [
        (CORPUS[record], TOKENIZER.decode(targets[row, g][kept[row, g]]))
        for row, record in enumerate(batch.index)
        for g in range(SAMPLES)
    ]
    records, _ = label_preferences(
        planted,
        [record.prompt for record, _ in duels],
        [record.response for record, _ in duels],
        [text for _, text in duels],
    )
    return records


def fitted_anchor(params, pairs):
    """A Bradley-Terry fit, stopped early, and its loss on a batch of pairs."""
    optimizer = optax.adam(3e-3)
    objective = make_reward_model(REWARD.token_rewards)
    update = make_update(objective, student_optimizer=optimizer)
    start = {"trunk": params, "head": TOKEN_HEAD.init(jax.random.key(1), 16)}
    state = init_state(start, student_optimizer=optimizer, rng=jax.random.key(0))
    batches = batches_of(pairs)
    for _ in range(10):
        state, metrics = update(state, None, next(batches), PreferenceSignal())
    assert float(metrics["reward_model/nll"]) < np.log(2) - 0.05

    @jax.jit
    def nll(anchor, batch):
        returns = pair_returns(REWARD.token_rewards, anchor, batch.sequences, None, 1.0)
        return bradley_terry(returns, label=batch.label)

    return state.student.params, nll


@jax.jit
def first_token_probs(params, prompts):
    """[B, V]: what the student would say first."""
    logits = STUDENT.logits(
        params, prompts.tokens, segment_ids=prompts.mask.astype(jnp.int32)
    )
    return jax.nn.softmax(logits[:, -1], axis=-1)


def test_pbkd_with_a_teacher_that_is_only_text():
    # Embeddings this small make it speak almost at random: a "z" in 1 of 8 words.
    start = random_params(STUDENT.config)
    start["embed"]["embedding"] *= 0.2
    pairs = labelled_pairs(start)
    anchor, nll = fitted_anchor(start, pairs)
    student, critic = optax.adam(1e-2), optax.adam(3e-3)
    update = make_update(
        make_pbkd(STUDENT, REWARD.token_rewards, epsilon=0.05),
        student_optimizer=student,
        critic_optimizer=critic,
        critic_steps=2,
    )
    state = init_state(
        start,
        student_optimizer=student,
        critic_params=anchor,
        critic_optimizer=critic,
        dual=10.0,
        rng=jax.random.key(0),
    )
    stream = ZippedBatches(
        {"demonstrations": batches_of(CORPUS), "pairs": batches_of(pairs)}
    )
    said = []  # how often the samples of a step contain the word
    for _ in range(STEPS):
        batch = next(stream)
        prompts = batch["demonstrations"].sequences.prompts
        rollouts = ROLL_OUT(
            state.student.params, prompts, step_keys(state).prepare
        ).sequences
        is_z = (rollouts.targets == WORDS["z"]) & rollouts.response_mask
        said.append(float(is_z.any(-1).mean()))
        signal = GameSignal(anchor_nll=nll(anchor, batch["pairs"]))
        game = GameBatch(batch["demonstrations"], rollouts, batch["pairs"])
        state, metrics = update(state, None, game, signal)

    # The student: the word it underused is where the teacher puts it, in every answer.
    before = first_token_probs(start, prompts)[:, WORDS["z"]]
    after = first_token_probs(state.student.params, prompts)[:, WORDS["z"]]
    assert float(before.max()) < 0.2
    assert float(after.min()) > 0.5
    assert said[0] < 0.5
    assert said[-1] > 0.9
    # The reward player: its own trunk moved, away from the student's start.
    trunk = state.critic.params["trunk"]
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), trunk, start)
    assert min(jax.tree.leaves(moved)) > 1e-3
    assert int(state.skipped) == 0
