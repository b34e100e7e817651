"""Training: an objective becomes an update, and an update becomes a run.

`Checkpoints` lives in `rkd_jax.training.checkpoint`: it needs orbax, this does not.
"""

from rkd_jax.training.interrupt import Interrupted
from rkd_jax.training.leaving import leave, leave_soon
from rkd_jax.training.loop import Diverged, fit
from rkd_jax.training.memory import MemoryReport, memory_report
from rkd_jax.training.metrics import MetricsWriter, read_metrics
from rkd_jax.training.optim import OptimConfig, make_optimizer, make_schedule
from rkd_jax.training.progress import Progress
from rkd_jax.training.run import RunFolder, RunMismatch, Stage
from rkd_jax.training.state import (
    Player,
    StepKeys,
    TrainState,
    init_state,
    state_shardings,
    step_keys,
)
from rkd_jax.training.update import make_update
