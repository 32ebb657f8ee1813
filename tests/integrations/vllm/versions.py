"""Whether other versions of vLLM have what the plugin relies on, read from their sources without importing them.

    python -m tests.integrations.vllm.versions vllm-0.26.0/ vllm-0.33.0/     # folders that hold an unpacked `vllm`

Prints a table of needs by versions, and exits with 1 where one is missing. The needs: every name that the plugin's own
sources import from vLLM (collected, so none is forgotten); the methods it wraps, overrides or calls, with the
parameters it knows; and the attributes it reads of vLLM's objects.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mixquant
from mixquant.integrations.vllm.runner import HOOKS

PLUGIN = Path(mixquant.__file__).parent / "integrations" / "vllm"

SIGNATURES: dict[str, tuple[str, ...]] = {
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model": ("self", "scheduler_output"),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._prepare_inputs": ("self", "scheduler_output"),
    "vllm.v1.cudagraph_dispatcher:CudagraphDispatcher.dispatch": ("self", "num_tokens", "*", "invalid_modes"),
    "vllm.v1.cudagraph_dispatcher:CudagraphDispatcher.get_capture_descs": ("self",),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._warmup_and_capture": ("self", "desc"),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.profile_cudagraph_memory": ("self",),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model": (
        "self", "scheduler_output", "intermediate_tensors", "dummy_run",
    ),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.update_requests": ("self", "scheduler_output"),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_inputs": ("self",),
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.dispatch": (
        "self", "num_reqs", "num_tokens", "uniform_token_count",
    ),
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.capture": ("self", "create_forward_fn"),
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.run_pw_graph": ("self", "model", "model_inputs"),
    "vllm.v1.engine.core:EngineCore.preprocess_add_request": ("self", "request"),
    "vllm.config.vllm:VllmConfig._set_cudagraph_sizes": ("self",),
    "vllm.model_executor.layers.quantization.base_config:QuantizationConfig.override_quantization_method": (
        "cls", "hf_quant_cfg", "user_quant", "hf_config",
    ),
    "vllm.model_executor.layers.quantization.base_config:QuantizationConfig.maybe_update_config": (
        "self", "model_name", "hf_config", "revision",
    ),
    "vllm.model_executor.layers.quantization.base_config:QuantizationConfig.apply_vllm_mapper": (
        "self", "hf_to_vllm_mapper",
    ),
    "vllm.model_executor.layers.quantization.base_config:QuantizationConfig.get_quant_method": (
        "self", "layer", "prefix",
    ),
    "vllm.model_executor.layers.linear:UnquantizedLinearMethod.create_weights": ("self", "layer"),
    "vllm.model_executor.layers.linear:UnquantizedLinearMethod.apply": ("self", "layer", "x", "bias"),
    "vllm.model_executor.layers.linear:ColumnParallelLinear.weight_loader_v2": ("self", "param", "loaded_weight"),
    "vllm.model_executor.layers.linear:RowParallelLinear.weight_loader_v2": ("self", "param", "loaded_weight"),
    "vllm.model_executor.layers.linear:ReplicatedLinear.weight_loader": ("self", "param", "loaded_weight"),
    "vllm.model_executor.layers.linear:MergedColumnParallelLinear.weight_loader_v2": (
        "self", "param", "loaded_weight", "loaded_shard_id",
    ),
    "vllm.model_executor.layers.linear:QKVParallelLinear.weight_loader_v2": (
        "self", "param", "loaded_weight", "loaded_shard_id",
    ),
    "vllm.model_executor.models.utils:WeightsMapper.apply_list": ("self", "values"),
    "vllm.utils.torch_utils:direct_register_custom_op": ("op_name", "op_func", "*", "fake_impl", "target_lib"),
    "vllm.transformers_utils.repo_utils:file_or_path_exists": ("model", "config_name", "revision"),
    "vllm.transformers_utils.repo_utils:get_hf_file_to_dict": ("file_name", "model", "revision"),
    "vllm.model_executor.layers.fused_moe.fused_moe_method_base:FusedMoEMethodBase.apply": (
        "self", "layer", "x", "topk_weights", "topk_ids", "shared_experts", "shared_experts_input",
    ),
    "vllm.model_executor.kernels.linear.nvfp4.cutlass:CutlassNvFp4LinearKernel.apply_weights": (
        "self", "layer", "x", "bias",
    ),
    "vllm.model_executor.kernels.linear.nvfp4.base:NvFp4LinearKernel.process_weights_after_loading": ("self", "layer"),
    "vllm.entrypoints.llm:LLM.__init__": (
        "self", "model", "*", "skip_tokenizer_init", "hf_overrides", "enforce_eager", "kv_cache_memory_bytes",
        "logits_processors",
    ),
    "vllm.sampling_params:SamplingParams.from_optional": (
        "*", "temperature", "max_tokens", "stop_token_ids", "ignore_eos", "detokenize", "skip_clone", "extra_args",
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector:NixlBaseConnector.__init__": (
        "self", "vllm_config", "role", "kv_cache_config",
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector:NixlBaseConnector.request_finished": (
        "self", "request", "block_ids",
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector:NixlBaseConnector.request_finished_all_groups": (
        "self", "request", "block_ids",
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector:NixlBaseConnector.get_num_new_matched_tokens": (
        "self", "request", "num_computed_tokens",
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector:NixlBaseConnector.update_state_after_alloc": (
        "self", "request", "blocks", "num_external_tokens",
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector:NixlBaseConnector.build_connector_meta": (
        "self", "scheduler_output",
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector:NixlPullConnector.start_load_kv": (
        "self", "forward_context",
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector:NixlBaseConnector.get_finished": (
        "self", "finished_req_ids",
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector:NixlBaseConnector.get_block_ids_with_load_errors": (
        "self",
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker:NixlBaseConnectorWorker._cleanup_remote_engine": (
        "self", "engine_id", "*", "log_eviction",
    ),
    "vllm.v1.sample.logits_processor:AdapterLogitsProcessor.new_req_logits_processor": ("self", "params"),
}  # fmt: skip
"""Parameters in order; those after a star may stand anywhere."""

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": ("input_batch", "device", "vllm_config"),
    "vllm.v1.worker.gpu_input_batch:InputBatch": (
        "num_reqs", "req_ids", "num_prompt_tokens", "num_computed_tokens_cpu",
    ),
    "vllm.v1.cudagraph_dispatcher:CudagraphDispatcher": ("vllm_config",),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner": ("req_states", "device", "vllm_config"),
    "vllm.v1.worker.gpu.input_batch:InputBatch": ("req_ids", "idx_mapping_np", "num_scheduled_tokens"),
    "vllm.v1.worker.gpu.states:RequestState": ("prompt_len", "num_computed_tokens_np", "req_id_to_index"),
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager": ("vllm_config", "_capture_descs"),
    "vllm.v1.worker.gpu.cudagraph_utils:ModelCudaGraphManager": ("capture",),
    "vllm.v1.worker.gpu.cudagraph_utils:BatchExecutionDescriptor": ("cg_mode", "num_tokens", "num_reqs"),
    "vllm.v1.core.sched.output:SchedulerOutput": (
        "num_scheduled_tokens", "scheduled_new_reqs", "finished_req_ids",
    ),
    "vllm.v1.core.sched.output:NewRequestData": (
        "req_id", "prompt_token_ids", "prompt_embeds", "num_computed_tokens",
    ),
    "vllm.v1.engine.core:EngineCore": ("vllm_config",),
    "vllm.v1.engine:EngineCoreRequest": ("cache_salt",),
    "vllm.forward_context:ForwardContext": ("no_compile_layers", "cudagraph_runtime_mode", "batch_descriptor"),
    "vllm.forward_context:BatchDescriptor": ("num_tokens",),
    "vllm.config.vllm:VllmConfig": (
        "quant_config", "model_config", "cache_config", "parallel_config", "device_config", "compilation_config",
        "speculative_config", "kv_transfer_config", "num_speculative_tokens", "scheduler_config",
    ),
    "vllm.config.model:ModelConfig": (
        "model", "revision", "dtype", "runner_type", "architectures", "is_encoder_decoder", "served_model_name",
        "max_model_len", "original_max_model_len", "get_total_num_hidden_layers", "get_total_num_kv_heads",
        "get_head_size",
    ),
    "vllm.config.parallel:ParallelConfig": (
        "use_ubatching", "prefill_context_parallel_size", "decode_context_parallel_size", "enable_expert_parallel",
        "data_parallel_index", "world_size", "tensor_parallel_size", "pipeline_parallel_size",
    ),
    "vllm.config.cache:CacheConfig": (
        "kv_sharing_fast_prefill", "kv_cache_memory_bytes", "gpu_memory_utilization", "cache_dtype", "block_size",
    ),
    "vllm.config.compilation:CompilationConfig": (
        "cudagraph_mode", "static_forward_context", "cudagraph_capture_sizes", "max_cudagraph_capture_size",
        "inductor_compile_config",
    ),
    "vllm.config.compilation:CUDAGraphMode": (
        "NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE", "mixed_mode", "has_full_cudagraphs",
        "has_piecewise_cudagraphs",
    ),
    "vllm.config.speculative:SpeculativeConfig": ("draft_model_config",),
    "vllm.config.kv_transfer:KVTransferConfig": (
        "kv_connector", "kv_connector_extra_config", "kv_connector_module_path", "kv_role", "kv_load_failure_policy",
    ),
    "vllm.config.device:DeviceConfig": ("device_type",),
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker:NixlBaseConnectorWorker": (
        "_recving_metadata", "_remote_agents",
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata:ReqMeta": ("local_block_ids", "remote"),
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata:RemoteMeta": ("engine_id",),
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata:NixlConnectorMetadata": ("reqs_to_recv",),
    "vllm.model_executor.layers.linear:LinearBase": ("input_size", "tp_rank", "tp_size", "quant_method"),
    "vllm.model_executor.layers.linear:MergedColumnParallelLinear": ("output_sizes",),
    "vllm.model_executor.layers.quantization.base_config:QuantizationConfig": ("packed_modules_mapping",),
    "vllm.model_executor.models.deepseek_v2:DeepSeekV2FusedQkvAProjLinear": ("_use_min_latency_gemm",),
    "vllm.model_executor.parameter:BasevLLMParameter": ("tp_rank", "tp_size"),
    "vllm.model_executor.layers.fused_moe.config:FusedMoEConfig": (
        "activation", "has_bias", "is_lora_enabled", "in_dtype", "device", "hidden_dim", "num_experts",
        "intermediate_size_per_partition", "moe_parallel_config", "dp_size", "pcp_size", "is_sequence_parallel",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Need:
    """A name of a module, or of a class in it; and the parameters of a function."""

    module: str
    name: str
    parameters: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.module.removeprefix('vllm.')}:{self.name}" + (
            f"({', '.join(self.parameters)})" if self.parameters else ""
        )


def needs() -> list[Need]:
    """All that the plugin relies on."""
    wrapped = [Need(module, f"{owner}.{name}") for module, owner, name in HOOKS]
    signatures = [Need(*key.split(":"), parameters) for key, parameters in SIGNATURES.items()]
    attributes = [Need(*f"{key}.{name}".split(":")) for key, names in ATTRIBUTES.items() for name in names]
    return [*dict.fromkeys([*wrapped, *signatures, *attributes, *imported()])]


def imported() -> Iterator[Need]:
    """Names that the plugin's sources import from vLLM."""
    for file in sorted(PLUGIN.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                yield from (Need(node.module or "", alias.name) for alias in node.names)


def lacks(root: Path, need: Need) -> str | None:
    """What is missing under `root`, the folder that holds `vllm`; None if the need is met."""
    owner, _, name = need.name.rpartition(".")
    names = members(root, need.module)
    if owner:
        scope = names.get(owner)
        if not isinstance(scope, ast.ClassDef):
            return f"no {owner}"
        names = bound(scope.body) | attributes(scope)
    if name not in names:
        return None if not owner and parsed(root, f"{need.module}.{name}") else "missing"
    return unlike(names[name], need.parameters) if need.parameters else None


def unlike(function: ast.AST, expected: Sequence[str]) -> str | None:
    """The parameters of a function, if they are not the expected ones."""
    if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
        return "not a function"
    arguments = function.args
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    found = [*positional, *(argument.arg for argument in arguments.kwonlyargs)]
    leading, _, anywhere = " ".join(expected).partition("*")
    fits = positional[: len(leading.split())] == leading.split() and set(anywhere.split()) <= set(found)
    return None if fits else f"({', '.join(found)})"


@functools.cache
def parsed(root: Path, module: str) -> ast.Module | None:
    path = root.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8")) if file.is_file() else None


def members(root: Path, module: str) -> dict[str, ast.AST]:
    """What a module binds; nothing where there is no such module."""
    tree = parsed(root, module)
    names = bound(tree.body) if tree else {}
    for node in tree.body if tree else ():
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            names |= members(root, f"{module}.{node.module}" if node.level else node.module or "")
    return names


def bound(body: Sequence[ast.stmt]) -> dict[str, ast.AST]:
    """What the statements of a module or class bind, also under `if` and `try`."""
    names: dict[str, ast.AST] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name: node for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id: node for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.If | ast.Try):
            names |= bound([*node.body, *node.orelse])
    return names


def attributes(scope: ast.AST) -> dict[str, ast.AST]:
    """What a class's methods set on `self`."""
    stored = (node for node in ast.walk(scope) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    return {node.attr: node for node in stored if isinstance(node.value, ast.Name) and node.value.id == "self"}


def version(root: Path) -> str:
    """The version of the vLLM under `root`, by its own file."""
    file = root / "vllm" / "_version.py"
    found = re.search(r"version = '([^']+)'", file.read_text(encoding="utf-8")) if file.is_file() else None
    return found[1] if found else root.name


def main(roots: Sequence[Path]) -> int:
    wanted = needs()
    answers = {need: [lacks(root, need) for root in roots] for need in wanted}
    print(f"| what the plugin relies on | {' | '.join(map(version, roots))} |\n|---|{'---|' * len(roots)}")
    for need, row in answers.items():
        print(f"| `{need}` | {' | '.join('yes' if answer is None else f'**{answer}**' for answer in row)} |")
    missing = sum(answer is not None for row in answers.values() for answer in row)
    print(f"\n{len(wanted)} needs, {missing} missing")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main([Path(argument) for argument in sys.argv[1:]]))
