#!/usr/bin/env bash
# What one CUDA GPU says of mixquant, step by step; real models are real_models.sh's, two GPUs pair.sh's.
#   benchmarks/gpu.sh OUT [STEP ...]       all steps by default: half an hour on an H200, we think
#   tests        CUDA kernels against their references                             tests.txt
#   products     nested weights, NVFP4 activations, emulation, casting, by itself  nested.json, activations.json, ...
#   memory       what engines take and leave: loading, graphs, KV cache            memory/*/memory.json
#   bench        mixquant bench of Qwen3-8B's shape: first tokens, agents, tails   arms.json, agent.json, ...
#   experts      the same of Qwen3-30B-A3B and GLM-4.5-Air; one layer; correctness  experts.json, glm.json, ...
#   transformers mixquant bench of Qwen3-8B's first 12 layers behind generate      transformers.json
#   blackwell    blackwell.sh with FP8 in NVFP4's place                            blackwell/
# Each step's output goes to OUT/STEP.txt. One that fails is named, and the next begins. From `memory` on vLLM is needed.
set -u
cd "$(dirname "$0")/.."
out=$(realpath -m "$1") python=${PYTHON:-python3} failed=0
shift
export PYTHONPATH=src:.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTHON=$python
mkdir -p "$out"

bench() { $python -m mixquant bench --load-format dummy --prefill fp8 "$@"; }
shape() { [ -d "$out/$1" ] || $python -m benchmarks.shapes "$@" "$out/$1"; }
workloads() { printf 'benchmarks/workloads/%s.json,' "$@" | sed 's/,$//'; }

step_tests() { $python -m pytest -q -p no:cacheprovider tests/kernels/test_cuda.py tests/kernels/test_streams.py; }
step_products() {
  $python benchmarks/nested_linear.py --json "$out/nested.json"
  $python benchmarks/nested_loading.py
  $python benchmarks/nvfp4_activations.py --json "$out/activations.json"
  $python benchmarks/emulation.py --json "$out/emulation.json"
  $python benchmarks/cast_per_step.py
}
step_memory() {
  $python -m benchmarks.vllm_memory "$out/memory/8b" 8b
  $python -m benchmarks.vllm_memory "$out/memory/30b" 30b-a3b bf16 fp8
}
step_bench() { benchmarks/vllm_bench.sh "$out"; }
step_experts() {
  $python -m pytest -q -s -p no:cacheprovider tests/integrations/vllm/test_fused_experts.py
  $python -m benchmarks.experts
  $python -m benchmarks.experts --backend triton
  $python -m benchmarks.experts glm-air-4
  for name in 30b-a3b-8 30b-a3b-24 glm-air-4; do shape $name; done
  bench "$out/30b-a3b-8" --arms bf16,vllm:fp8,phase --arm tail32=fp8,tail=32 \
    --workload "$(workloads experts)" -o "$out/experts.json"
  bench "$out/glm-air-4" --arms bf16,vllm:fp8,phase --workload "$(workloads experts experts-decode)" -o "$out/glm.json"
  # Steps of 8 layers are as fast as the host starts them, and made-up weights send each arm's answers to other experts.
  VLLM_MOE_ROUTING_SIMULATION_STRATEGY=uniform_random bench "$out/30b-a3b-24" --arms bf16,phase \
    --workload "$(workloads experts-decode)" -o "$out/experts-decode.json"
}
step_transformers() {
  shape 8b-12 --weights
  bench "$out/8b-12" --engine transformers --arms bf16,uniform,phase --arm copies=fp8,storage=separate \
    --workload "$(workloads transformers decode)" -o "$out/transformers.json"
}
step_blackwell() { shape 8b-12 --weights && benchmarks/blackwell.sh "$out/8b-12" "$out/blackwell" --prefill fp8; }

[ $# -gt 0 ] || set -- tests products memory bench experts transformers blackwell
for step in "$@"; do
  begin=$SECONDS
  (set -e; "step_$step") >"$out/$step.txt" 2>&1 # not before ||, where bash ignores set -e
  if [ $? = 0 ]; then end=done; else end=FAILED failed=1; tail -n 20 "$out/$step.txt" >&2; fi
  echo "$step $end after $((SECONDS - begin)) s"
done
exit $failed
