"""Teach an instruction-tuned language model new languages without re-aligning it.

Importing this package registers its tuner with PEFT: `get_peft_model(model, MoeDeltaConfig(...))`. The command line
alone puts that off until a command has work to do, and reads these names nowhere; `program` says why.
"""

from .program import VERSION, is_command_line

if not is_command_line():
    from .allocation import allocate_experts, group_languages
    from .calibration import calibrate_routers, made_up_conversations
    from .errors import PeftMoeDeltaError
    from .evaluation import EvalReport, TaskSet, evaluate_languages
    from .graft.delta import PostTrainingDelta
    from .graft.files import graft_checkpoint
    from .graft.memory import to_stock
    from .identifier import fit_identifier
    from .languages import LanguageTable
    from .mixing import RouterStatistics, fit_routers, mix
    from .model import MoeDeltaModel
    from .monitor import TrainingMonitor
    from .plan import ExpertPlan
    from .pretrained import load
    from .registration import register
    from .training import AuxiliaryLossMixin, LanguageCollator, RoutingCallback
    from .tuner import MoeDeltaConfig
    from .vocabulary import extend_vocabulary, propose_tokens

    register()

__version__ = VERSION
__all__ = [
    "AuxiliaryLossMixin",
    "EvalReport",
    "ExpertPlan",
    "LanguageCollator",
    "LanguageTable",
    "MoeDeltaConfig",
    "MoeDeltaModel",
    "PeftMoeDeltaError",
    "PostTrainingDelta",
    "RouterStatistics",
    "RoutingCallback",
    "TaskSet",
    "TrainingMonitor",
    "allocate_experts",
    "calibrate_routers",
    "evaluate_languages",
    "extend_vocabulary",
    "fit_identifier",
    "fit_routers",
    "graft_checkpoint",
    "group_languages",
    "load",
    "made_up_conversations",
    "mix",
    "propose_tokens",
    "to_stock",
]
