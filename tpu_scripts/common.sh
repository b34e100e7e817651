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
  --type TYPE      RKD_TPU_TYPE      such as v5litepod-1, v5p-8, v6e-8
  --runtime NAME   RKD_TPU_RUNTIME   software of the TPU VM; by default the one for TYPE
  --capacity KIND  RKD_TPU_CAPACITY  spot (cheap, may be taken away) or on-demand
  --bucket gs://.. RKD_TPU_BUCKET    where runs/ is kept while an experiment runs; without
                                     one a preemption loses the run
  --jax VERSION    RKD_TPU_JAX       of jax; by default the newest that fits
  --dry-run        prints the commands, executes nothing
  --help

RKD_TPU_POLL: seconds between two looks at a queued resource, 30 by default."

say() { printf '%s\n' "$*"; }

die() { # die [STATUS] MESSAGE
  local status=1
  if (($# > 1)); then
    status=$1
    shift
  fi
  printf 'error: %s\n' "$1" >&2
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
  CAPACITY=${RKD_TPU_CAPACITY:-} JAX=${RKD_TPU_JAX:-} DRY_RUN=0
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

# Refuses what no experiment can use; finds CHIPS, and RUNTIME if none was named.
read_type() {
  local runtime
  # The number counts chips for v5e and v6e, and cores, two to a chip, for v4 and v5p. Up
  # to eight of either are on one host.
  [[ $TYPE =~ ^(v4|v5litepod|v5p|v6e)-([1-9][0-9]*)$ && ${BASH_REMATCH[2]} -gt 8 ]] &&
    die 2 "--type $TYPE is a slice of several hosts, and these scripts start one process \
on one host (docs/scaling.md); choose ${BASH_REMATCH[1]}-8 or smaller"
  case $TYPE in
    v4-8) runtime=tpu-ubuntu2204-base CHIPS=4 ;;
    v5p-8) runtime=v2-alpha-tpuv5 CHIPS=4 ;;
    v5litepod-[148]) runtime=v2-alpha-tpuv5-lite CHIPS=${TYPE#*-} ;;
    v6e-[148]) runtime=v2-alpha-tpuv6e CHIPS=${TYPE#*-} ;;
    *) die 2 "--type $TYPE: known are v4-8, v5p-8, v5litepod-1, -4, -8 and v6e-1, -4, -8" ;;
  esac
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
  ((CHIPS == 1)) ||
    say "# an experiment computes on one of the $CHIPS chips of $TYPE (docs/scaling.md)"
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

# on_workers COMMAND: on every host of the slice, through the login shell.
on_workers() {
  execute gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker=all "--command=$1"
}

# worker WORD...: a step of worker.sh on the TPU VM.
worker() {
  on_workers "$(quote bash "$FOLDER/tpu_scripts/worker.sh" "$@")"
}

# set_up ARCHIVE: the project on the TPU VM, in place of what was there except runs/ and
# the environment. Status $BUSY, and nothing changed, while an experiment runs.
set_up() {
  local requirement="jax[tpu]${JAX:+==$JAX}" command
  command="mkdir -p $FOLDER && cd $FOLDER && { flock -n .lock true || exit $BUSY; } &&"
  command+=' find . -mindepth 1 -maxdepth 1 ! -name runs ! -name .venv ! -name .lock'
  command+=" -exec rm -rf {} + && tar -xzf ../$FOLDER.tar.gz &&"
  command+=" $(quote bash tpu_scripts/worker.sh install "$requirement")"
  execute gcloud compute tpus tpu-vm scp "$1" "$NAME:$FOLDER.tar.gz" "${WHERE[@]}" \
    --worker=all && on_workers "$command"
}

# launch SNAPSHOT EXPERIMENT [OVERRIDE...]: a no-op if it runs there already, or is done.
launch() {
  [[ -n $1 ]] || say "# no bucket: a preemption loses the run"
  worker start "$@"
}
