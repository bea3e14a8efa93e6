#!/usr/bin/env bash
# Everything that only a GPU can show, in one go: for one H100 or H200, under eight minutes.
#
#     benchmarks/gpu_check.sh FOLDER              # what each part printed goes to FOLDER as it goes
#     benchmarks/gpu_check.sh FOLDER --dry-run    # the same parts, small, on the CPU: does the script work?
#
# It needs torch, triton, transformers, accelerate, lightning and pytest, and nothing installed of this project. A part
# that fails or takes too long does not stop the others; the last lines say how each of them ended. Parts that time
# nothing run side by side, before those that do.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath "${1:?say where the results go: benchmarks/gpu_check.sh FOLDER [--dry-run]}")
dry=${2:-}
mkdir -p "$folder"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
[ "$dry" ] && export CUDA_VISIBLE_DEVICES=
python=${PYTHON:-python3}
: > "$folder/summary"

patience=1
[ "$dry" ] && patience=5 # a CPU may be busy with other things

part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$(($2 * patience)) start=$SECONDS code
    shift 2
    timeout "$limit" "$@" > "$folder/$name.log" 2>&1
    code=$?
    printf '%-18s %4d s  %s\n' "$name" $((SECONDS - start)) "$([ $code = 0 ] && echo right || echo "exit status $code")" |
        tee -a "$folder/summary"
}

tests() { # Warnings of other versions of torch and transformers than CI's are no failures here.
    $python -m pytest -q -p no:cacheprovider -o filterwarnings=default -m gpu "$@"
    local code=$?
    [ "$dry" ] && [ $code = 5 ] && code=0
    return $code
}
export -f tests
export python dry

if [ "$dry" ]; then
    steps=(--sizes tiny --tokens 16 --rounds 1) overhead=(--tokens 8 --rounds 1 --backends eager) megabytes=1
    big=(tiny) short=(--tokens 16 --rounds 1) passes=(--elements 4096 --small 2 --rounds 1)
    int4=(--size tiny --tokens 16 --rounds 1)
    host=(--layers 2 --repeats 2)
    few=0 many=0 races=(-m 'not gpu' -k misses tests/laws/test_races.py) # on the simulated device
else
    steps=(--sizes 1.3b 6.7b --profile --save) overhead=(--backends eager triton --rounds 5 --save) megabytes=512
    big=(13b) short=(--rounds 3 --save) passes=(--save) int4=(--size 6.7b --layers 8 --rounds 3 --save)
    host=(--layers 24 --repeats 10 --save)
    few=4 many=8 races=(tests/gpu/test_races_cuda.py)
    part device 20 nvidia-smi
    part quickstart 120 $python examples/quickstart.py &
fi
part versions 60 $python -c "
import accelerate, lightning, torch, transformers
for package in (torch, transformers, accelerate, lightning): print(package.__name__, package.__version__)" &
part tests-kernels 150 bash -c 'tests "$@"' tests -n $many tests/gpu/test_triton.py tests/gpu/test_triton_together.py &
part tests-offload 150 bash -c 'tests "$@"' tests -n $few tests/gpu/test_offload_cuda.py tests/gpu/test_shared_blocks_cuda.py &
part tests-methods 90 bash -c 'tests "$@"' tests -n $((few / 2)) tests/gpu/test_methods_cuda.py &
part races 60 bash -c 'tests "$@"' tests -n $few "${races[@]}" &
wait
part link 30 $python -m benchmarks.link --megabytes $megabytes
part host 30 $python -m benchmarks.host_overhead "${host[@]}"
part passes 60 $python -m benchmarks.passes "${passes[@]}"
part overhead-float32 60 $python -m benchmarks.step_overhead --dtype float32 "${overhead[@]}"
part overhead-bfloat16 60 $python -m benchmarks.step_overhead --dtype bfloat16 "${overhead[@]}"
part opt 120 $python -m benchmarks.opt_streamed "${steps[@]}"
part opt-large 120 $python -m benchmarks.opt_streamed --sizes "${big[@]}" "${short[@]}"
part momentum 60 $python -m benchmarks.opt_streamed --sizes "${big[@]}" --layers 4 --rule momentum "${short[@]}"
part int4 60 $python -m benchmarks.int4_streamed "${int4[@]}"
cat "$folder/summary"
! grep -qv 'right$' "$folder/summary"
