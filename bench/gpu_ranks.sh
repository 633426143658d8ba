#!/bin/sh
# Several GPUs against one: the same bits? how fast? It has NEVER RUN ON TWO GPUS, only on a CPU (DEVICE=cpu), where all of it
# but nvidia-smi and --gpus is the same. A call takes no options, but reads variables:
#   [OUT=bench/results/gpu_ranks] [DEVICE=cuda|cpu] [MODES="eager compile graph"] [PYTHON=python3] [SETTINGS="..."] bench/gpu_ranks.sh
# OUT gets results.txt, times.txt, topology.txt and logs/. Runs go to a temporary folder, which stays if something failed.
# In results.txt a line for each comparison says "same", "DIFFERS", or "FAILED" for a run that did not end or was not killed in time.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root:$root/kernels:$root/bench${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3} device=${DEVICE:-cuda} out=${OUT:-$root/bench/results/gpu_ranks} limit_s=${LIMIT_S:-900}
images="--data textures --set data.textures_test_count=64 --set probe.every_epochs=0"
if [ "$device" = cpu ]; then
  modes=${MODES:-eager} spread="--ranks 2 --processes 2" turns=${TURNS:-1}
  settings=${SETTINGS:-"--preset demo --width 4 --batch-size 8 --res 16 --epochs 8 --set data.textures_count=64 --set data.limit=0"}
else
  modes=${MODES:-eager compile graph} spread="--ranks 2 --gpus 2" turns=${TURNS:-3}
  settings=${SETTINGS:-"--preset blog --batch-size 256 --res 32 --epochs 8 --set data.textures_count=16384"}
fi
within="--ranks 2 --processes 1" # the same two ranks as threads of one process, on one GPU
mkdir -p "$out/logs" && work=$(mktemp -d) || exit 2
: >"$out/results.txt"
failed=0

say() { echo "$*" | tee -a "$out/results.txt"; }
fail() { failed=1; say "$@"; }
log() { echo "$out/logs/$1.log"; }

# train NAME OPTIONS...: a whole run. Words are split on purpose.
train() {
  name=$1 && shift
  # shellcheck disable=SC2086
  timeout -k 30 "$limit_s" "$python" -m fastbyol.cli.main train $images $settings --device "$device" "$@" --out "$work/$name" \
    >"$(log "$name")" 2>&1 || fail "FAILED  $name: code $?, see logs/$name.log"
}

# begin NAME OPTIONS...: a run in the background, `launcher` its process; returns at its first checkpoint after a step.
begin() {
  name=$1 && shift
  # shellcheck disable=SC2086
  "$python" -m fastbyol.cli.main train $images $settings --device "$device" "$@" --out "$work/$name" >"$(log "$name")" 2>&1 &
  launcher=$! waited=0
  until ls "$work/$name"/checkpoints/ckpt-*[1-9]*.safetensors >/dev/null 2>&1; do
    kill -0 "$launcher" 2>/dev/null && [ "$waited" -lt $((limit_s * 10)) ] || return 1
    sleep .1 && waited=$((waited + 1))
  done
}

# end NAME: wait for the run that `begin` began, `limit_s` seconds at most.
end() {
  (sleep "$limit_s" && kill -9 "$launcher") 2>/dev/null &
  guard=$!
  wait "$launcher"
  code=$?
  kill "$guard" 2>/dev/null
  return "$code"
}

# worker_of PID RANK: the process of a rank, among the children of its launcher.
worker_of() {
  for folder in /proc/[0-9]*; do
    grep -qs "^PPid:[[:space:]]*$1\$" "$folder/status" || continue
    if tr '\0' '\n' 2>/dev/null <"$folder/environ" | grep -qx "RANK=$2"; then echo "${folder#/proc/}" && return; fi
  done
  return 1
}

# same WHAT RUN OTHER: compare the last checkpoints' bytes.
same() {
  if answer=$("$python" -m fastbyol_bench.gpu.rank_runs same "$work/$2" "$work/$3" 2>&1); then say "same    $1"; else
    fail "$(echo "$answer" | tail -1)  ($1)"; fi
}

{
  uname -a && "$python" -c 'import torch; print("torch", torch.__version__, "GPUs", torch.cuda.device_count())'
  if [ "$device" = cuda ]; then nvidia-smi && nvidia-smi topo -m; fi
} >"$out/topology.txt" 2>&1
say "device $device, modes $modes, settings: $settings"

for mode in $modes; do
  last=$mode
  train "$mode-two" $spread --engine "$mode"
  # Threads cannot compile.
  if [ "$mode" = eager ]; then
    train "$mode-one" $within --engine "$mode"
    same "$mode: two ranks in two processes, and in one" "$mode-two" "$mode-one"
  fi
  # Stopped by a signal to the launcher, and resumed.
  if begin "$mode-resumed" $spread --engine "$mode" && kill -TERM "$launcher"; then
    end; say "        $mode-resumed: stopped with code $?"
    # shellcheck disable=SC2086
    timeout -k 30 "$limit_s" "$python" -m fastbyol.cli.main resume "$work/$mode-resumed" ${spread#--ranks 2} \
      >>"$(log "$mode-resumed")" 2>&1 || fail "FAILED  $mode-resumed: resume ended with code $?"
    same "$mode: a run, and one stopped and resumed" "$mode-two" "$mode-resumed"
  else fail "FAILED  $mode-resumed: over before it could be stopped"; fi
  # The second rank is killed; the launcher starts both again from the newest checkpoint.
  if begin "$mode-killed" $spread --engine "$mode" && victim=$(worker_of "$launcher" 1) && kill -KILL "$victim"; then
    end || fail "FAILED  $mode-killed: code $?"
    grep -q "a rank was lost" "$(log "$mode-killed")" || fail "FAILED  $mode-killed: was not started again"
    same "$mode: a run, and one whose second rank was killed" "$mode-two" "$mode-killed"
  else fail "FAILED  $mode-killed: over before a rank could be killed"; fi
done

# Epochs, in turns: one GPU, two with the same batch, two with twice the batch.
# shellcheck disable=SC2086
batch=$(echo $settings | sed -n 's/.*--batch-size \([0-9]*\).*/\1/p')
for turn in $(seq "$turns"); do
  train "time-one-$turn" --engine "$last"
  train "time-two-$turn" $spread --engine "$last"
  train "time-two-double-$turn" $spread --engine "$last" --batch-size $((2 * ${batch:-256}))
done
"$python" -m fastbyol_bench.gpu.rank_runs epochs "$work"/time-* >"$out/times.txt" 2>&1 || fail "FAILED  times: see times.txt"
cat "$out/times.txt"
if [ "$failed" = 0 ]; then rm -rf "$work"; else say "the runs are in $work"; fi
exit "$failed"
