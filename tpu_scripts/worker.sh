#!/usr/bin/env bash
# What the other scripts do on the TPU VM; they call it there.
#
#   worker.sh install REQUIREMENT [HOSTS]    python, this project, jax for TPU
#   worker.sh devices HOSTS                  all of the slice, once all hosts are installed
#   worker.sh share HOSTS SNAPSHOT           of several hosts: runs/ of worker 0 ...
#   worker.sh join HOSTS                     ... becomes that of the others (shared_runs.sh)
#   worker.sh start SNAPSHOT EXPERIMENT ...  in the background, unless it runs or is done
#   worker.sh run SNAPSHOT EXPERIMENT ...    in the foreground; start calls it
#   worker.sh logs LINES
#   worker.sh stop
#
# SNAPSHOT is the object of a bucket that holds runs/ as a tar file, or '' for none. It is
# written every RKD_TPU_SNAPSHOT_EVERY seconds, 300 by default, and at the end.

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=tpu_scripts/shared_runs.sh
source "$(dirname "${BASH_SOURCE[0]}")/shared_runs.sh"
cd "$ROOT"

JOB=runs/.launch # command, pid, log and exit status of the experiment
remember_worker
# An experiment whose backend is missing fails; it does not go on, slowly, on the CPU.
export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu} PYTHONUNBUFFERED=1

install() {
  if (($# > 1)); then
    find_worker "$2"
    install_nfs
  fi
  PATH=$HOME/.local/bin:$PATH
  command -v make >/dev/null || sudo apt-get install --yes make
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  # The python of the image may be too old.
  uv python install --managed-python 3.12
  make PYTHON="$(uv python find --managed-python --no-project 3.12)" .venv/run.stamp
  .venv/bin/pip install --quiet "$1"
  # One of several hosts sees no devices unless all look at the same time.
  [[ -n $WORKER ]] || .venv/bin/python -c 'import jax; print("devices:", jax.devices())'
}

# Whoever lives of the experiment's processes holds the lock through descriptor 9.
start() {
  local snapshot=$1 command
  shift
  mkdir -p "$JOB"
  command=$(quote "$@")
  if [[ -n $WORKER ]]; then
    start_together "$snapshot" "$@"
    return
  fi
  exec 9>.lock
  if ! flock -n 9; then
    [[ $(<"$JOB/command") == "$command" ]] ||
      die "another experiment runs, stop.sh ends it: $(<"$JOB/command")"
    say "it runs already"
    return
  fi
  if [[ -n $snapshot && ! -e $JOB/command ]]; then
    restore "$snapshot"
  fi
  if [[ -e $JOB/status && $(<"$JOB/status") == 0 && $(<"$JOB/command") == "$command" ]]
  then
    say "it has finished: $command"
    return
  fi
  begin "$snapshot" "$@"
}

# begin SNAPSHOT EXPERIMENT ...: what start has found to be due; it holds the lock.
begin() {
  local snapshot=$1 command
  shift
  command=$(quote "$@")
  rm -f "$JOB/status" "$JOB/asked"
  printf '%s\n' "$command" >"$JOB/command"
  nohup setsid bash "$ROOT/tpu_scripts/worker.sh" run "$snapshot" "$@" \
    </dev/null >>"$JOB/log" 2>&1 &
  printf '%s\n' $! >"$JOB/pid"
  say "started as process $!: $command"
}

run() {
  local snapshot=$1 status=0 keeper=
  shift
  WHO='' # logs.sh says whose log it is
  # The experiment is told to stop as well, and saves; the last snapshot comes after it.
  trap : TERM
  if [[ -n $snapshot ]]; then
    keep_snapshots "$snapshot" 9>&- &
    keeper=$!
  fi
  say "== $(date -u +%FT%TZ) $(quote "$@")"
  .venv/bin/python -m "$@" || status=$?
  say "== $(date -u +%FT%TZ) exit status $status"
  printf '%s\n' "$status" >"$JOB/status"
  if [[ -n $snapshot ]]; then
    kill "$keeper" 2>/dev/null || true
    take_snapshot "$snapshot"
  fi
  return "$status"
}

keep_snapshots() {
  while sleep "${RKD_TPU_SNAPSHOT_EVERY:-300}"; do
    take_snapshot "$1" || say "no snapshot this time; the next one is tried as usual"
  done
}

# Hard links freeze runs/ within milliseconds, because the files of a run are replaced as a
# whole or appended to. One that vanishes meanwhile makes cp fail, and so the snapshot.
# Uploaded as one object, it is in the bucket whole or not at all.
take_snapshot() (
  exec 8>.snapshot.lock
  flock 8
  rm -rf .snapshot && mkdir .snapshot && cp -al runs .snapshot/ || exit 1
  tar -cf .snapshot.tar -C .snapshot runs || (($? == 1)) || exit 1 # 1: the log grew
  gcloud storage cp --quiet .snapshot.tar "$1"
)

restore() {
  local found
  if ! found=$(gcloud storage ls "$1" 2>&1); then
    [[ $found == *"matched no objects"* ]] || die "cannot look for $1: $found"
    say "there is no $1 yet: a new run"
    return
  fi
  gcloud storage cp --quiet "$1" .snapshot.tar
  tar -xf .snapshot.tar
  rm .snapshot.tar
  say "restored runs/ from $1"
}

logs() {
  [[ -e $JOB/log ]] || die "nothing was launched here"
  [[ -n $WORKER ]] || exec tail -n "$1" -F "$JOB/log"
  tail -n "$1" -F "$JOB/log" | sed -u "s/^/$WHO/"
}

stop() {
  if flock -n .lock true; then
    say "nothing runs"
  elif [[ -n $WORKER && -e $JOB/asked ]]; then
    stop_again
  elif [[ -n $WORKER && -e $JOB/status ]]; then
    touch "$JOB/asked"
    say "$(what_it_does)" # another worker may be why stop.sh is called
  else
    [[ -z $WORKER ]] || touch "$JOB/asked"
    kill -TERM -- "-$(<"$JOB/pid")"
    say "asked to stop: it saves and ends, logs.sh shows when"
  fi
}

case ${1:-} in
  install | devices | share | join | start | run | logs | stop) "$@" ;;
  *) die 2 "worker.sh is called by the other scripts" ;;
esac
