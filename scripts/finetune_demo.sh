#!/usr/bin/env bash
# Fine-tune the demo model on sentences about medical technology, on the CPU, and let two workers
# write with the adapter that came out. `make finetune-demo` runs this; the commands that it shows
# are the ones to type by hand.
#
#   PROMPT="An infusion pump" make finetune-demo     another prompt
#   SAVE_DIR=my-run EPOCHS=10 make finetune-demo     keep the results, train longer
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
data=$root/examples/finetune
prompt=${PROMPT:-"The nurse checks"}
epochs=${EPOCHS:-6}
tokens=${TOKENS:-40}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
save_dir=${SAVE_DIR:-$scratch/run}

bold='' plain=''
if [ -t 1 ]; then bold=$'\033[1m' plain=$'\033[0m'; fi
show() { printf '\n%s$ %s%s\n' "$bold" "$*" "$plain"; }

# Text of one model, without what the manager says beside it.
write() {
  show "manager generate --spawn 2 $*" >&2
  manager generate --spawn 2 --max-new-tokens "$tokens" "$@" 2>"$scratch/said" || {
    cat "$scratch/said" >&2
    exit 1
  }
}

# One number of a run's figures.
figure() { sed -n "s/^ *\"$1\": \([^,]*\),*$/\1/p" "$scratch/result.json"; }

before=$(write "$prompt")
echo "$before"

command=(manager finetune lora --train_path "$data/train.txt" --val_path "$data/validation.txt"
  --save_dir "$save_dir" --epochs "$epochs" --batch_size 8 --lr 3e-3 --lora_r 16 --no_cuda --threads 1)
show "${command[*]}"
"${command[@]}" --json >"$scratch/result.json"

after=$(write --adapter "$save_dir/lora_adapters" "$prompt")
echo "$after"

batch=(manager batch --spawn 2 --adapter "$save_dir/lora_adapters" --prompts "$data/prompts.txt"
  --max-new-tokens "$tokens")
show "${batch[*]}"
"${batch[@]}"

first=$(figure first_validation_loss)
last=$(figure last_validation_loss)
awk -v a="$first" -v b="$last" 'BEGIN { exit !(b < a) }' || {
  echo "finetune-demo: the validation loss did not fall ($first at first, $last at the end)." >&2
  exit 1
}
if [ "$before" = "$after" ]; then
  echo "finetune-demo: the text is the same as before." >&2
  exit 1
fi

awk -v a="$first" -v b="$last" 'BEGIN {
  printf "\nValidation loss %.3f before, %.3f after; the text has changed.\n", a, b }'
if [ -n "${SAVE_DIR:-}" ]; then
  echo "Everything is in $save_dir: begin with $save_dir/report.md."
else
  echo "SAVE_DIR=my-run make finetune-demo keeps the adapter, the merged model and the report."
fi
