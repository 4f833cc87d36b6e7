"""What ComfyUI asks the pack for."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from sage_diffusion.nodes.accuracy import SageAccuracyCheck
from sage_diffusion.nodes.attention import SageAttention, SageReport
from sage_diffusion.nodes.autotune import SageAutoTune
from sage_diffusion.nodes.calibrate import SageCalibrate
from sage_diffusion.nodes.doctor import SageDoctor
from sage_diffusion.nodes.host import (
    register_plan_folder,
    register_routes,
    register_tokenizer_folder,
)
from sage_diffusion.nodes.kv import KVCacheCompression, KVCacheReport
from sage_diffusion.nodes.kv_calibration import (
    KVCalibrate,
    LoadKVCalibration,
    SaveKVCalibration,
    register_calibration_folder,
)
from sage_diffusion.nodes.plan import (
    SageEditPlan,
    SageLoadPlan,
    SageMergePlans,
    SagePlanPreview,
    SageSavePlan,
)
from sage_diffusion.nodes.verify import SageVerify
from sage_diffusion.nodes.vq import (
    CodebookInspector,
    ConvertTokenizer,
    LoadVQTokenizer,
    LoadVQTokens,
    SaveVQTokens,
    VQDecode,
    VQEncode,
    VQTokenEdit,
)
from sage_diffusion.nodes.vq_fill import VQFill
from sage_diffusion.nodes.vq_search import VQSearch
from sage_diffusion.nodes.vq_train import CodebookRepair, TrainVQTokenizer

NODES: list[type[io.ComfyNode]] = [
    SageAttention,
    SageReport,
    SageAutoTune,
    SageLoadPlan,
    SageSavePlan,
    SageMergePlans,
    SageEditPlan,
    SagePlanPreview,
    SageCalibrate,
    SageAccuracyCheck,
    SageDoctor,
    SageVerify,
    LoadVQTokenizer,
    VQEncode,
    VQDecode,
    VQTokenEdit,
    VQFill,
    CodebookInspector,
    SaveVQTokens,
    LoadVQTokens,
    ConvertTokenizer,
    TrainVQTokenizer,
    CodebookRepair,
    VQSearch,
    KVCacheCompression,
    KVCacheReport,
    KVCalibrate,
    SaveKVCalibration,
    LoadKVCalibration,
]


class SageExtension(ComfyExtension):
    """The pack."""

    async def on_load(self) -> None:
        """Register the pack's folders below ``models``, and what the page asks for."""
        register_plan_folder()
        register_tokenizer_folder()
        register_calibration_folder()
        register_routes()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node."""
        return NODES
