#!/usr/bin/env bash
# Measures PROMA and the demonstration's algorithm on one GPU, at Qwen3-0.6B's shapes: 2 microbatches
# of 8 x 1,536 tokens, 28 layers, scanned and rematerialised, bfloat16. Needs Python >= 3.11 with jax,
# optax, numpy and, for the demonstration, torch; nothing is installed, no network is used.
#
#     benchmarks/gpu.sh                             all of it, in at most 9 minutes
#     benchmarks/gpu.sh --parts jax rounds --methods plain_sum plain_batched intra_100 --minutes 5
#     benchmarks/gpu.sh --size micro --device cpu   a rehearsal without a GPU; its numbers mean nothing
#
# Seconds at most for each part, in this order; what a part leaves is there for the later ones:
#
#     device     30  device and versions
#     smoke      70  some 20 of the library's tests, if pytest and hypothesis are installed
#     torch      75  the demonstration by hooks, beside plain policy gradient, eager
#     compiled   80  plain policy gradient with torch.compile, beside the eager one
#     jax        75  for each method: a process of its own, which compiles it and runs it twice
#     rounds    120  the same methods together, in interleaved rounds; compiled programs are reused
#
# The 9 methods of "jax" share what the parts before leave of the 540 seconds, less 120 for "rounds":
# some 26 seconds each, or 18 if the others take all of their time. They go in order of importance; one
# that no time is left for is a failure, and may be measured by a second call.
#
# Results go to $OUT or, unset, to results/gpu (a rehearsal's to runs/gpu): results.jsonl as they come,
# log.txt with all that the parts print, table.md.
# The status is 0 if nothing failed; a part whose packages are not installed is skipped, and said so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
