# What every script shares: settings, --dry-run, and the steps several of them take.
# shellcheck shell=bash

set -euo pipefail

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: bash >= 4.4 is needed, this is $BASH_VERSION" >&2
  exit 2
fi

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
FOLDER=rkd_jax # of the project, in the home folder of the TPU VM
BUSY=75        # exit status of a step that an experiment's running forbids
POLL=${RKD_TPU_POLL:-30}

SETTINGS="Settings, the same for every script, before any other argument; each is also an
environment variable:

  --project ID     RKD_TPU_PROJECT   Google Cloud project
  --zone ZONE      RKD_TPU_ZONE      such as us-west4-a
  --name NAME      RKD_TPU_NAME      of the queued resource and of its TPU VM
  --type TYPE      RKD_TPU_TYPE      such as v5litepod-1, v6e-8, v5p-64; for a slice of
                                     several hosts every script needs it
  --runtime NAME   RKD_TPU_RUNTIME   software of the TPU VM; by default the one for TYPE
  --capacity KIND  RKD_TPU_CAPACITY  spot (cheap, may be taken away) or on-demand
  --bucket gs://.. RKD_TPU_BUCKET    where runs/ is kept while an experiment runs; without
                                     one a preemption loses the run
  --jax VERSION    RKD_TPU_JAX       of jax; by default the newest that fits
  --dry-run        prints the commands, executes nothing
  --help

RKD_TPU_POLL: seconds between two looks at a queued resource, 30 by default."

WHO='' # put before every message: which worker speaks, where there are several
say() { printf '%s\n' "$WHO$*"; }

die() { # die [STATUS] MESSAGE
  local status=1
  if (($# > 1)); then
    status=$1
    shift
  fi
  printf 'error: %s\n' "$WHO$1" >&2
  exit "$status"
}

# Words as a POSIX shell reads them back, whatever they hold.
quote() {
  local word line=
  for word; do
    if [[ $word == '' || $word == *[^A-Za-z0-9_./:=@%+,-]* ]]; then
      word="'${word//\'/\'\\\'\'}'"
    fi
    line+=" $word"
  done
  printf '%s' "${line# }"
}

# Runs a command; under --dry-run prints it.
execute() {
  if ((DRY_RUN)); then
    say "$(quote "$@")"
  else
    "$@"
  fi
}

# The comment at the top of a script is its help.
print_help() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  say "
$SETTINGS"
}

# Reads the settings; what follows them is left in ARGUMENTS.
read_settings() {
  PROJECT=${RKD_TPU_PROJECT:-} ZONE=${RKD_TPU_ZONE:-} NAME=${RKD_TPU_NAME:-}
  TYPE=${RKD_TPU_TYPE:-} RUNTIME=${RKD_TPU_RUNTIME:-} BUCKET=${RKD_TPU_BUCKET:-}
  CAPACITY=${RKD_TPU_CAPACITY:-} JAX=${RKD_TPU_JAX:-} DRY_RUN=0 HOSTS=1
  local flag
  while (($#)); do
    flag=${1%%=*}
    case $flag in
      --help | -h) print_help && exit ;;
      --dry-run) DRY_RUN=1 && shift && continue ;;
      --project | --zone | --name | --type | --runtime | --capacity | --bucket | --jax) ;;
      -*) die 2 "unknown option $1; --help lists all" ;;
      *) break ;;
    esac
    if [[ $1 == *=* ]]; then
      set -- "$flag" "${1#*=}" "${@:2}"
    fi
    (($# > 1)) || die 2 "$flag needs a value"
    flag=${flag#--}
    printf -v "${flag^^}" %s "$2"
    shift 2
  done
  ARGUMENTS=("$@")
}

# need SETTING...: these are there, and whatever is there is well-formed.
need() {
  local setting
  for setting; do
    [[ -n ${!setting} ]] ||
      die 2 "--${setting,,} or RKD_TPU_$setting is needed; --help describes it"
  done
  BUCKET=${BUCKET%/}
  check_form --project "$PROJECT" '[a-z0-9][a-z0-9.:-]*'
  check_form --zone "$ZONE" '[a-z0-9-]+'
  check_form --name "$NAME" '[a-z]([-a-z0-9]{0,61}[a-z0-9])?'
  check_form --capacity "$CAPACITY" '|spot|on-demand'
  check_form --bucket "$BUCKET" '|gs://[a-z0-9][a-z0-9._-]+(/[A-Za-z0-9._-]+)*'
  check_form --runtime "$RUNTIME" '|[a-z0-9][a-z0-9.-]*'
  check_form --jax "$JAX" '|[0-9]+(\.[0-9]+)*'
  [[ -z $TYPE ]] || read_type
  ((DRY_RUN)) || command -v gcloud >/dev/null ||
    die "gcloud is not installed, see https://cloud.google.com/sdk/docs/install"
  WHERE=("--project=$PROJECT" "--zone=$ZONE")
  # shellcheck disable=SC2034 # read by the scripts: what resume.sh will need
  RECORD=$ROOT/runs/tpu/$NAME
}

# check_form WHAT VALUE PATTERN
check_form() {
  [[ $2 =~ ^($3)$ ]] || die 2 "$1 '$2' is malformed, it has to match ${3#|}"
}

no_more_arguments() {
  ((${#ARGUMENTS[@]} == 0)) || die 2 "unexpected argument ${ARGUMENTS[0]}; see --help"
}

# Refuses what does not exist; finds HOSTS, CHIPS, and RUNTIME if none was named. The
# number counts cores for v4 and v5p, two to a chip, and chips for v5e and v6e. A host has
# four chips, but a v5e or v6e host alone may have one or eight.
read_type() {
  local kind=${TYPE%-*} number=${TYPE##*-} runtime='' cores=0
  case $kind in
    v4) runtime=tpu-ubuntu2204-base cores=8192 ;;
    v5p) runtime=v2-alpha-tpuv5 cores=12288 ;;
    v5litepod) runtime=v2-alpha-tpuv5-lite ;;
    v6e) runtime=v2-alpha-tpuv6e ;;
  esac
  CHIPS=0
  [[ $number =~ ^[1-9][0-9]{0,4}$ ]] || runtime=
  if [[ -n $runtime ]] && ((cores)); then
    case $number in
      8 | 16 | 32 | 64) CHIPS=$((number / 2)) ;;
      *) ((number % 128 || number > cores)) || CHIPS=$((number / 2)) ;;
    esac
  elif [[ -n $runtime ]]; then
    case $number in
      1 | 4 | 8 | 16 | 32 | 64 | 128 | 256) CHIPS=$number ;;
    esac
  fi
  ((CHIPS)) || die 2 "--type $TYPE: known are v4-8, -16, -32, -64 and multiples of 128 \
up to v4-8192; v5p the same up to v5p-12288; v5litepod-1, -4, -8, -16, -32, -64, -128, \
-256; v6e the same"
  HOSTS=$((CHIPS <= 8 && !cores || CHIPS == 4 ? 1 : CHIPS / 4))
  RUNTIME=${RUNTIME:-$runtime}
}

# find_state ASSUMED: STATE of the queued resource, ABSENT if there is none.
find_state() {
  local errors status=0
  local command=(gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}"
    '--format=value(state.state)')
  if ((DRY_RUN)); then
    execute "${command[@]}"
    say "# assumed to be $1"
    STATE=$1
    return
  fi
  errors=$(mktemp)
  STATE=$("${command[@]}" 2>"$errors") || status=$?
  if ((status)) && grep -q NOT_FOUND "$errors"; then
    STATE=ABSENT
  elif ((status)) || [[ -z $STATE ]]; then
    cat "$errors" >&2
    rm -f "$errors"
    die "gcloud does not say in which state $NAME is"
  fi
  rm -f "$errors"
}

create() {
  local kind=()
  [[ $CAPACITY == on-demand ]] || kind=("--$CAPACITY")
  if ((HOSTS > 1)); then
    say "# an experiment computes on all $CHIPS chips of $TYPE, in a process on each of its \
$HOSTS hosts (docs/scaling.md)"
  elif ((CHIPS > 1)); then
    say "# an experiment computes on one of the $CHIPS chips of $TYPE (docs/scaling.md)"
  fi
  execute gcloud compute tpus queued-resources create "$NAME" "--node-id=$NAME" \
    "${WHERE[@]}" "--accelerator-type=$TYPE" "--runtime-version=$RUNTIME" "${kind[@]}"
}

delete() {
  execute gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
}

# Polls until the TPU VM is there. Ctrl-C ends the polling, not the request.
wait_until_active() {
  find_state ACTIVE
  while [[ $STATE != ACTIVE ]]; do
    case $STATE in
      ABSENT | DELETING | FAILED | SUSPENDING | SUSPENDED)
        die "$NAME is $STATE and will not come; resume.sh or delete_vm.sh clears it away"
        ;;
    esac
    say "$NAME is $STATE; looking again in $POLL s (Ctrl-C: it stays in the queue)"
    sleep "$POLL"
    find_state ACTIVE
  done
  say "# $NAME is ACTIVE"
}

# on_workers COMMAND [WORKER]: on every host of the slice, or one, through the login shell.
# gcloud returns when all have ended, with the first status that is not 0. Where a
# connection breaks it executes the command again.
on_workers() {
  execute gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" "--worker=${2:-all}" \
    "--command=$1"
}

# worker WORD...: a step of worker.sh on every host.
worker() {
  on_workers "$(quote bash "$FOLDER/tpu_scripts/worker.sh" "$@")"
}

# set_up ARCHIVE: the project on the TPU VM, in place of what was there except runs/ and
# the environment. Status $BUSY, and nothing changed, while an experiment runs.
set_up() {
  local install=(install "jax[tpu]${JAX:+==$JAX}") command
  if ((HOSTS > 1)); then
    # None may be changed while one is busy, so all are asked before.
    command="test ! -e $FOLDER/.lock || flock -n $FOLDER/.lock true || exit $BUSY"
    on_workers "$command" || return
    install+=("$HOSTS")
  fi
  command="mkdir -p $FOLDER && cd $FOLDER && { flock -n .lock true || exit $BUSY; } &&"
  command+=' find . -mindepth 1 -maxdepth 1 ! -name runs ! -name .venv ! -name .lock'
  command+=" -exec rm -rf {} + && tar -xzf ../$FOLDER.tar.gz &&"
  command+=" $(quote bash tpu_scripts/worker.sh "${install[@]}")"
  execute gcloud compute tpus tpu-vm scp "$1" "$NAME:$FOLDER.tar.gz" "${WHERE[@]}" \
    --worker=all && on_workers "$command" || return
  ((HOSTS == 1)) || worker devices "$HOSTS"
}

# launch SNAPSHOT EXPERIMENT [OVERRIDE...]: a no-op if it runs there already, or is done.
launch() {
  [[ -n $1 ]] || say "# no bucket: a preemption loses the run"
  if ((HOSTS > 1)); then
    worker share "$HOSTS" "$1" # worker 0, before the others mount what it shares
    worker join "$HOSTS"       # all, before any starts: each tells the rest how it stands
  fi
  worker start "$@"
}
