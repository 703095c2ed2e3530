#!/usr/bin/env bash
# Two workers on this machine, half of the demo model each, write text together.
# `make demo` runs this; the commands that it shows are the ones to type by hand.
#
#   PROMPT="Open the file" make demo     another prompt
set -euo pipefail

prompt=${PROMPT:-"Return a list of"}
tokens=${TOKENS:-96}
ready_s=120 # importing torch takes seconds on a laptop, and a minute from an SD card

scratch=$(mktemp -d)
pids=()

# Ends the workers that this script started, and only those, however the script ends.
stop() {
  trap - EXIT INT TERM
  for pid in ${pids[@]+"${pids[@]}"}; do kill "$pid" 2>/dev/null || true; done
  for pid in ${pids[@]+"${pids[@]}"}; do wait "$pid" 2>/dev/null || true; done
  rm -rf "$scratch"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

bold='' plain=''
if [ -t 1 ]; then bold=$'\033[1m' plain=$'\033[0m'; fi
show() { printf '\n%s$ %s%s\n' "$bold" "$*" "$plain"; }

# Port 0 takes whichever port is free, so that a demo beside running workers is no trouble.
for index in 0 1; do
  mkfifo "$scratch/$index"
  command=(worker --sections 2 --index "$index" --threads 1 --listen 127.0.0.1:0 --log-level warning)
  show "${command[*]} &"
  "${command[@]}" >"$scratch/$index" &
  pids+=($!)
  # Held open until the end, so that a worker can always write to its stdout.
  if [ "$index" = 0 ]; then exec 3<"$scratch/0"; else exec 4<"$scratch/1"; fi
done

# A worker says `ready HOST:PORT section ...` once; without that line it has said why on stderr.
addresses=()
for fd in 3 4; do
  if ! read -r -t "$ready_s" line <&"$fd"; then
    echo "demo: worker $((fd - 3)) ended, or was not ready after $ready_s s." >&2
    exit 1
  fi
  echo "$line"
  read -r _ address _ <<<"$line"
  addresses+=("$address")
done
workers=$(IFS=,; echo "${addresses[*]}")

show "manager workers --workers $workers"
manager workers --workers "$workers"

style=(--temperature 0.7 --top-p 0.9 --repetition-penalty 1.1 --seed 1) # greedy text of so small a model loops
show "manager generate --workers $workers --max-new-tokens $tokens ${style[*]} '$prompt'"
manager generate --workers "$workers" --max-new-tokens "$tokens" "${style[@]}" "$prompt"

printf '\nBoth workers stop now. README.md says how to run them on two machines.\n'
