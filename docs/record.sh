#!/bin/sh
# Records docs/terminal.svg, a terminal in which the demo's model trains and is followed:
#   sh docs/record.sh <the demo's model> <a file of conversations>
# Needs shardtune, asciinema (Debian's) and svg-term (npm's svg-term-cli).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
ln -s "$(realpath "$1")" "$work/smollm2"
cp "$2" "$work/train.jsonl"
cat >"$work/session.sh" <<'END'
say() {
    printf '\033[1;32m$\033[0m %s\n' "$*"
    sleep 1
    "$@"
    sleep 2
    echo
}
say shardtune train model.path=smollm2 data.path=train.jsonl data.eval_share=0.2 tuning=lora strategy=fsdp2 \
    launcher.processes=2 budget.epochs=2 batch.global=8 run.dir=runs/first
say shardtune status
say shardtune status runs/first
END
cd "$work"
COLUMNS=100 asciinema rec --quiet --overwrite --cols 100 --rows 34 --idle-time-limit 1 --command "sh session.sh" session.cast
svg-term --in session.cast --out "$here/terminal.svg" --window --width 100 --height 34
