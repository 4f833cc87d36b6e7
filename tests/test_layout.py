"""Every module is tested somewhere that can be found, and nothing grows too large to read."""

import ast

import pytest
from test_imports import ROOT, modules

#: Test file -> the modules that it tests besides the one of its own name.
ALSO_TESTS = {
    "accuracy/test_report.py": (
        "sage_diffusion.accuracy.charts sage_diffusion.accuracy.findings "
        "sage_diffusion.accuracy.heatmap sage_diffusion.accuracy.records "
        "sage_diffusion.accuracy.render sage_diffusion.accuracy.report_json"
    ),
    "adapt/test_calibrate.py": "sage_diffusion.adapt.sampling sage_diffusion.adapt.sensitivity",
    "adapt/test_evaluate.py": "sage_diffusion.adapt.plots",
    "adapt/test_costs.py": "sage_diffusion.adapt.times",
    "adapt/test_planner.py": "sage_diffusion.adapt.compress sage_diffusion.plan.globs",
    "adapt/test_table.py": "sage_diffusion.adapt.table_json",
    "attend/test_dispatch.py": (
        "sage_diffusion.attend.backend sage_diffusion.attend.backends sage_diffusion.attend.calls "
        "sage_diffusion.attend.providers sage_diffusion.attend.validation sage_diffusion.machine"
    ),
    "attend/test_guard.py": "sage_diffusion.attend.finite",
    "attend/test_session.py": "sage_diffusion.attend.layer sage_diffusion.attend.summary",
    "attend/test_signs.py": "sage_diffusion.plan.signs",
    "commands/test_cli.py": (
        "sage_diffusion.__main__ sage_diffusion.cli sage_diffusion.commands.common "
        "sage_diffusion.commands.compare "
        "sage_diffusion.commands.demo sage_diffusion.commands.doctor "
        "sage_diffusion.commands.options sage_diffusion.commands.side_by_side"
    ),
    "commands/test_cli_plans.py": (
        "sage_diffusion.commands.calibrate sage_diffusion.commands.evaluate "
        "sage_diffusion.commands.plan"
    ),
    "comfy/test_in_process.py": (
        "sage_diffusion.integrations.comfy.accuracy sage_diffusion.integrations.comfy.layers"
    ),
    "comfy/test_in_process_nodes.py": "nodes.autotune nodes.progress",
    "comfy/test_server_training.py": "nodes.vq_train",
    "comfy/test_in_process_kv_calibration.py": (
        "nodes.kv_calibration sage_diffusion.integrations.comfy.kv_calibration "
        "sage_diffusion.integrations.comfy.kv_inside"
    ),
    "comfy/test_in_process_kv.py": (
        "sage_diffusion.integrations.comfy.causal_wan sage_diffusion.integrations.comfy.kv_patch"
    ),
    "comfy/test_server.py": (
        "nodes.accuracy nodes.attention nodes.calibrate nodes.doctor nodes.extension nodes.host "
        "nodes.kv nodes.plan nodes.verify nodes.vq nodes.vq_fill nodes.vq_search "
        "sage_diffusion.integrations.comfy.verify"
    ),
    "integrations/test_calibrated_pipelines.py": "sage_diffusion.integrations.diffusers.sampler",
    "integrations/test_comfy_kv.py": "sage_diffusion.integrations.comfy.kv_report",
    "integrations/test_comfy_patch.py": "sage_diffusion.integrations.comfy.model",
    "integrations/test_diffusers_compile.py": "sage_diffusion.attend.ops",
    "integrations/test_diffusers_fill.py": "sage_diffusion.vq.fill",
    "integrations/test_diffusers_memory.py": (
        "sage_diffusion.integrations.diffusers.standin sage_diffusion.integrations.diffusers.weak"
    ),
    "integrations/test_diffusers_names.py": "sage_diffusion.plan.names",
    "integrations/test_diffusers_pipelines.py": "sage_diffusion.integrations.diffusers.patch",
    "integrations/test_diffusers_safety.py": "sage_diffusion.integrations.diffusers.rebind",
    "integrations/test_diffusers_vq.py": "sage_diffusion.integrations.diffusers.taming",
    "integrations/test_diffusers_schedule.py": "sage_diffusion.integrations.diffusers.followed",
    "kernels/test_attention.py": "kernels.attention.reference kernels.attention.terms",
    "kernels/test_attention_triton.py": "kernels.attention.triton kernels.attention.triton_masks"
    " kernels.attention.triton_value",
    "kernels/test_attention_triton_fp4.py": "kernels.attention.triton_fp4",
    "kernels/test_launches.py": "kernels.attention.entry",
    "kernels/test_tuning.py": "kernels.attention.record",
    "kernels/test_gluon_attention.py": (
        "kernels.attention.gluon kernels.attention.gluon_asm kernels.attention.gluon_columns "
        "kernels.attention.gluon_fp4 kernels.attention.gluon_kernel "
        "kernels.attention.gluon_layouts kernels.attention.gluon_masks "
        "kernels.attention.gluon_program kernels.attention.gluon_tile"
    ),
    "kernels/test_hopper_attention.py": (
        "kernels.attention.hopper kernels.attention.hopper_kernel kernels.attention.operands"
    ),
    "kernels/test_quantize.py": (
        "kernels.quantize.limits kernels.quantize.permute kernels.quantize.reference"
    ),
    "kernels/test_quantize_triton.py": (
        "kernels.quantize.stats kernels.quantize.triton kernels.quantize.triton_fp4 "
        "kernels.quantize.triton_rows kernels.quantize.triton_value kernels.tiles"
    ),
    "plan/test_edit.py": "sage_diffusion.plan.fingerprint",
    "plan/test_library.py": "sage_diffusion.plan.catalog",
    "plan/test_plan.py": "sage_diffusion.plan.plan_json sage_diffusion.plan.rules",
    "speed/test_bench.py": (
        "sage_diffusion.commands.bench sage_diffusion.speed.bench_report "
        "sage_diffusion.speed.timing"
    ),
    "speed/test_cost.py": (
        "sage_diffusion.commands.cost sage_diffusion.speed.cost_compile "
        "sage_diffusion.speed.cost_sass sage_diffusion.speed.gpus"
    ),
    "speed/test_tune.py": (
        "sage_diffusion.attend.launch sage_diffusion.attend.launches "
        "sage_diffusion.attend.launches_json sage_diffusion.commands.tune"
    ),
    "test_packaging.py": "sage_diffusion.files",
    "verify/test_verdicts.py": "sage_diffusion.attend.verdicts",
    "verify/test_verify_faults.py": "sage_diffusion.verify.checks sage_diffusion.verify.text",
    "verify/test_verify_places.py": (
        "sage_diffusion.commands.verify sage_diffusion.verify.cases sage_diffusion.verify.places "
        "sage_diffusion.verify.procedure sage_diffusion.verify.record"
    ),
    "verify/test_verify_worker.py": (
        "sage_diffusion.verify.ahead sage_diffusion.verify.kernels sage_diffusion.verify.run "
        "sage_diffusion.verify.worker"
    ),
    "test_first_gpu.py": "sage_diffusion.verify.speed",
    "kernels/test_kv_decode.py": "kernels.kv.reference kernels.kv.sides",
    "kernels/test_kv_gluon.py": (
        "kernels.kv.asm kernels.kv.gluon kernels.kv.gluon_kernel kernels.kv.gluon_layouts"
    ),
    "kernels/test_kv_layout.py": "kernels.kv.layout",
    "kernels/test_kv_triton.py": "kernels.kv.triton",
    "kernels/test_nearest_code.py": "kernels.vq.blocks kernels.vq.reference kernels.vq.terms",
    "kernels/test_nearest_code_triton.py": "kernels.vq.triton",
    "integrations/test_transformers_cache.py": (
        "sage_diffusion.integrations.transformers.lazy "
        "sage_diffusion.integrations.transformers.rope sage_diffusion.kv.report"
    ),
    "commands/test_cli_kv.py": (
        "sage_diffusion.commands.kv sage_diffusion.integrations.transformers.loading"
    ),
    "integrations/test_transformers_kv_calibration.py": (
        "sage_diffusion.integrations.transformers.tap"
    ),
    "kv/test_calibrated.py": (
        "sage_diffusion.kv.calibration sage_diffusion.kv.coefficients sage_diffusion.kv.moments"
    ),
    "integrations/test_transformers_kv_evaluate.py": "sage_diffusion.kv.evaluate",
    "kv/test_other_methods.py": (
        "sage_diffusion.kv.methods.matryoshka sage_diffusion.kv.methods.prefixkv "
        "sage_diffusion.kv.methods.xkv"
    ),
    "kv/test_methods.py": (
        "sage_diffusion.kv.method sage_diffusion.kv.methods.gear sage_diffusion.kv.methods.kivi "
        "sage_diffusion.kv.methods.lossless sage_diffusion.kv.methods.vidkv "
        "sage_diffusion.kv.presets sage_diffusion.kv.split"
    ),
    "kv/test_rolling.py": "sage_diffusion.kv.scratch",
    "kv/test_layer.py": "sage_diffusion.kv.kept",
    "kv/test_packed.py": "sage_diffusion.kv.columns sage_diffusion.kv.store",
    "kv/test_cost_of_decoding.py": "sage_diffusion.kv.cost",
    "kv/test_packed_codes.py": "sage_diffusion.kv.codes",
    "vq/test_cost_of_search.py": "sage_diffusion.vq.cost",
    "vq/test_token_edit.py": "sage_diffusion.vq.edit sage_diffusion.vq.pictures",
    "integrations/test_transformers_vq.py": "sage_diffusion.integrations.transformers.vq_emu3",
    "vq/test_families.py": "sage_diffusion.vq.families.magvit sage_diffusion.vq.families.titok",
    "vq/test_quantizers.py": (
        "sage_diffusion.vq.quantizers.base sage_diffusion.vq.quantizers.combined "
        "sage_diffusion.vq.quantizers.ibq sage_diffusion.vq.quantizers.scalar "
        "sage_diffusion.vq.quantizers.scales "
        "sage_diffusion.vq.quantizers.simvq sage_diffusion.vq.quantizers.vector "
        "sage_diffusion.vq.usage"
    ),
    "vq/test_search.py": (
        "sage_diffusion.vq.codebooks sage_diffusion.vq.hosts sage_diffusion.vq.memory"
    ),
    "vq/test_tokenizers.py": (
        "sage_diffusion.commands.vq sage_diffusion.commands.vq_pictures "
        "sage_diffusion.vq.checkpoints sage_diffusion.vq.families.base "
        "sage_diffusion.vq.families.compact sage_diffusion.vq.idfile sage_diffusion.vq.scores "
        "sage_diffusion.vq.tokenizer"
    ),
    "vq/test_training.py": "sage_diffusion.commands.vq_train sage_diffusion.vq.repair",
}

LISTED = {name: file for file, names in ALSO_TESTS.items() for name in names.split()}
PACKAGES = {path.parent for path in modules().values() if path.name == "__init__.py"}


def own_tests(module):
    """``test_<name>.py`` in the folder that mirrors the module's; a host's name goes before."""
    *folders, name = module.removeprefix("sage_diffusion.").split(".")
    folder = ROOT / "tests" / (folders[0] if folders else "")
    prefix = f"{folders[1]}_" if folders[:1] == ["integrations"] else ""
    return [
        p for p in (folder / f"test_{prefix}{name}.py", folder / f"test_{name}.py") if p.exists()
    ]


@pytest.mark.parametrize(
    "module", sorted(name for name, path in modules().items() if path.name != "__init__.py")
)
def test_every_module_is_tested_where_one_looks(module):
    if own_tests(module):
        assert module not in LISTED, "it has a test file of its own name: take it off the list"
    else:
        assert module in LISTED, "give it a test file, or list it in ALSO_TESTS"


def test_the_list_is_true():
    assert set(LISTED) <= set(modules())
    assert all((ROOT / "tests" / file).is_file() for file in ALSO_TESTS)


def test_no_two_test_files_have_one_name():
    """pytest collects only one of them where folders are no packages."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted({*names})


def functions(path):
    """Every function of a file that is no kernel."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            made = [ast.unparse(d) for d in node.decorator_list]
            if not any("jit" in d or "constexpr_function" in d for d in made):
                yield node


#: Calls whose arguments users name one by one: public ones, the operators that ``torch.compile``
#: needs flat, kernels' entries, commands with their options and nodes with their inputs.
MANY_ARGUMENTS = {
    "kernels.attention.entry": "attention",
    "kernels.attention.gluon": "attend_quantized attention",
    "kernels.attention.gluon_columns": "key_bias",
    "kernels.attention.hopper": "attend_quantized attention",
    "kernels.attention.operands": "quantize_operands",
    "kernels.attention.reference": "attention attend_quantized",
    "kernels.attention.triton": "attend_quantized attention",
    "kernels.attention.triton_fp4": "attend_quantized attention",
    "kernels.quantize.reference": "quantize_rows",
    "kernels.quantize.together": "quantize_together",
    "kernels.quantize.triton": "quantize_rows",
    "kernels.quantize.triton_value": "quantize_value",
    "nodes.accuracy": "execute",
    "nodes.attention": "execute",
    "nodes.autotune": "execute",
    "nodes.calibrate": "execute",
    "sage_diffusion.adapt.calibrate": "calibrate",
    "sage_diffusion.adapt.compress": "compress",
    "sage_diffusion.attend.dispatch": "attention",
    "sage_diffusion.attend.ops": "_ attention layer_attention",
    "sage_diffusion.attend.session": "attend",
    "sage_diffusion.integrations.comfy.model": "__init__",  # what `patch` takes
    "sage_diffusion.integrations.diffusers.bundled": "__call__",
    "sage_diffusion.integrations.diffusers.processors": "_dispatch",  # diffusers' own signature
    "sage_diffusion.speed.bench": "measure",
    "sage_diffusion.speed.bench_report": "predict",  # as bench.measure
}


def rows(path):
    """Lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def parameters(node):
    """How many a function has, ``self`` and ``cls`` aside."""
    a = node.args
    names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def lines_of(node):
    """Of a function's body, without signature and docstring."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("module", sorted(modules()))
def test_nothing_is_too_large_to_read(module):
    path = modules()[module]
    assert rows(path) <= 500
    command = module.startswith("sage_diffusion.commands.")
    for node in functions(path):
        assert lines_of(node) <= 80, node.name
        if not command and node.name not in MANY_ARGUMENTS.get(module, "").split():
            assert parameters(node) <= 8, node.name


@pytest.mark.parametrize("folder", ["benchmarks", "tests", "tools"])
def test_no_other_file_is_too_large_either(folder):
    assert [path.name for path in (ROOT / folder).rglob("*.py") if rows(path) > 500] == []
