# A slice of several hosts: one runs/ for all of them, and all start an experiment or none.
# shellcheck shell=bash

# Every host has a disk of its own, but the processes of a run need one folder, in which
# files can be renamed, appended to and linked; no bucket that is mounted gives that. So
# worker 0 serves its runs/ by NFS to the others, over the internal network of the slice,
# and alone copies it to the bucket and back. What belongs to one worker (pid, log, exit
# status) lies in runs/.launch for worker 0, as on a single host, and in
# runs/.launch/worker-N for the others, so that all logs are copied.

PATH=$PATH:/usr/sbin:/sbin # of exportfs and mount.nfs4
SLICE=../$FOLDER.worker    # which worker this is, and of how many; setup_vm.sh leaves it
PATIENCE=${RKD_TPU_MOUNT_PATIENCE:-120} # seconds that a mount may take
MAY_SAVE=${RKD_TPU_STOP_PATIENCE:-300}  # seconds from being asked to stop to being killed

# job NUMBER: the folder of a worker.
job() {
  if (($1)); then
    printf runs/.launch/worker-%s "$1"
  else
    printf runs/.launch
  fi
}

# WORKER and HOSTS as they were found, or '' and 1 on a single host.
remember_worker() {
  WORKER='' HOSTS=1
  [[ ! -e $SLICE ]] || read -r WORKER HOSTS <"$SLICE"
  if [[ -n $WORKER ]]; then
    # shellcheck disable=SC2034 # read by say and die
    WHO="worker $WORKER: "
    JOB=$(job "$WORKER")
  fi
}

metadata() {
  local server=${GCE_METADATA_IP:-metadata.google.internal}
  curl -sSf --retry 5 --retry-delay 1 --retry-all-errors --max-time 60 \
    -H 'Metadata-Flavor: Google' \
    "http://$server/computeMetadata/v1/instance/attributes/$1"
}

# find_worker HOSTS: which one this is, and the ADDRESSES of all, where JAX looks for them
# too (GceTpuCluster): its process N is worker N, and the first address is that of 0.
find_worker() {
  local number='' found='' unknown endpoints endpoint parts
  unknown="the metadata server does not say which worker of $1 this is"
  number=$(metadata agent-worker-number) || die "$unknown"
  found=$(metadata worker-network-endpoints) || die "$unknown"
  ADDRESSES=()
  IFS=, read -ra endpoints <<<"$found"
  for endpoint in "${endpoints[@]}"; do
    IFS=: read -ra parts <<<"$endpoint"
    case ${#parts[@]} in
      1) ADDRESSES+=("${parts[0]}") ;; # the newer form: names of hosts
      3) ADDRESSES+=("${parts[2]}") ;;
      *) die "the metadata server names a worker that cannot be read: $endpoint" ;;
    esac
  done
  ((${#ADDRESSES[@]} == $1)) ||
    die "the metadata server names ${#ADDRESSES[@]} workers, --type has $1"
  [[ $number =~ ^[0-9]+$ && $number -lt $1 ]] ||
    die "the metadata server calls this worker '$number' of $1"
  # At once, for another step may be reading it.
  printf '%s %s\n' "$number" "$1" >"$SLICE.$$" && mv "$SLICE.$$" "$SLICE"
  remember_worker
}

# A fresh TPU VM may still be updating itself. apt waits for that where it installs, but
# not where it updates its lists.
install_nfs() {
  local program=mount.nfs4 package=nfs-common apt try
  ((WORKER)) || program=exportfs package=nfs-kernel-server
  if ! command -v "$program" >/dev/null; then
    apt=(sudo env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600)
    for ((try = 0; try < 20; try++)); do
      if "${apt[@]}" --quiet update; then break; fi
      sleep "$POLL"
    done
    "${apt[@]}" install --yes "$package"
  fi
}

devices() {
  find_worker "$1"
  .venv/bin/python -c 'import jax

jax.distributed.initialize()
found = f"devices: {jax.device_count()} of {jax.process_count()} processes"
if jax.process_index() == 0:
    print(found)'
}

# share HOSTS SNAPSHOT: worker 0 fetches runs/ back if it is a new one, then serves it.
share() {
  local options others
  find_worker "$1"
  ((WORKER == 0)) || return 0
  command -v exportfs >/dev/null ||
    die "there is no NFS server; setup_vm.sh installs it when it is told the --type"
  mkdir -p "$JOB"
  exec 9>.lock
  if [[ -n $2 && ! -e $JOB/command ]] && flock -n 9; then
    restore "$2"
  fi
  # all_squash: whatever the user's number on another worker, files there are this user's.
  # fsid=0: mounted as "/", so no folder above it, such as a closed home, is passed.
  # sync: what another worker was told is saved is on the disk.
  options="rw,sync,no_subtree_check,fsid=0,all_squash,anonuid=$(id -u),anongid=$(id -g)"
  sudo systemctl start nfs-server
  others=("${ADDRESSES[@]:1}")
  sudo exportfs -o "$options" "${others[@]/%/:$ROOT/runs}"
}

# join HOSTS: the others mount it; each writes down how it stands, before any may start.
join() {
  local state
  find_worker "$1"
  if ((WORKER)) && ! mountpoint -q runs; then
    command -v mount.nfs4 >/dev/null ||
      die "there is no NFS client; setup_vm.sh installs it when it is told the --type"
    mkdir -p runs
    # What another worker makes, renames or appends is seen at once: neither names nor
    # attributes are kept. Data is, until a file is closed.
    sudo timeout "$PATIENCE" mount -t nfs4 -o hard,lookupcache=none,actimeo=0,retry=1 \
      "${ADDRESSES[0]}:/" runs ||
      die "cannot mount runs/ of worker 0 (${ADDRESSES[0]}); the firewall has to let the \
hosts of the slice reach each other (tcp:2049, and what jax uses)"
  fi
  [[ -d runs/.launch ]] || die "runs/ is not that of worker 0"
  mkdir -p "$JOB"
  if ! flock -n .lock true; then
    state=running
    [[ ! -e $JOB/status ]] || state=copying # to the bucket, as the last thing
    printf '%s %s\n' "$state" "$(<"$JOB/command")" >"$JOB/state"
  elif [[ -e $JOB/status && $(<"$JOB/status") == 0 ]]; then
    printf 'finished %s\n' "$(<"$JOB/command")" >"$JOB/state"
  else
    printf 'idle\n' >"$JOB/state"
  fi
}

# verdict COMMAND: what is to be done with it. All workers come to the same one: it rests
# on what they wrote in `join`, and on nothing that may have changed since.
verdict() {
  local number state here=() same=0 copying=0
  for ((number = 0; number < HOSTS; number++)); do
    state=$(<"$(job "$number")/state") || die "worker $number has not joined"
    [[ $state != "running "* ]] || here+=("$number")
    [[ $state != "running $1" ]] || same=$((same + 1))
    [[ $state != "copying "* ]] || copying=1
  done
  if ((same == HOSTS)); then
    say "it runs already"
  elif ((${#here[@]} == HOSTS)); then
    say "another experiment runs, stop.sh ends it: $(<runs/.launch/command)"
  elif ((${#here[@]})); then
    say "nothing was started: on worker ${here[*]} of $HOSTS the last experiment has not \
ended yet, on the others it has. It should within minutes; stop.sh asks it to, a \
stop.sh some minutes later kills it"
  elif ((copying)) && [[ $(<runs/.launch/command) == "$1" ]]; then
    say "it has ended and is being copied to the bucket"
  elif ((copying)); then
    say "the last experiment is still being copied to the bucket; launch again after that"
  elif [[ $(<runs/.launch/state) == "finished $1" ]]; then
    say "it has finished: $1" # worker 0 writes the report
  else
    say start
  fi
}

# start_together SNAPSHOT EXPERIMENT ...: `start` of one of several workers.
start_together() {
  local snapshot=$1 command found
  shift
  command=$(quote "$@")
  found=$(WHO='' verdict "$command")
  case $found in
    start) ;;
    "it "*)
      ((WORKER)) || say "$found"
      return
      ;;
    *)
      ((WORKER)) || die "$found"
      exit 1
      ;;
  esac
  exec 9>.lock
  if ! flock -n 9; then # gcloud or somebody else was here a moment ago
    say "it runs already"
    return
  fi
  ((WORKER == 0)) || snapshot=''
  begin "$snapshot" "$@"
}

# To one of several processes SIGTERM is a notice, which it reads between two steps: one
# that hangs never does. One that saves must not be killed, and gcloud may have executed
# stop.sh twice: so that has to be some minutes ago. The launcher is spared, which takes
# the last snapshot.
stop_again() {
  local pid processes seconds
  seconds=$(($(date +%s) - $(stat -c %Y "$JOB/asked")))
  if ((seconds < MAY_SAVE)); then
    say "$(what_it_does); a stop.sh in $((MAY_SAVE - seconds)) s kills it"
    return
  fi
  pid=$(<"$JOB/pid")
  mapfile -t processes < <(pgrep -g "$pid" | grep -vx "$pid")
  kill -KILL "${processes[@]}" 2>/dev/null || true
  say "killed: it had been asked to stop before"
}

what_it_does() {
  if [[ -e $JOB/status ]]; then
    printf 'it has ended and is copied to the bucket'
  else
    printf 'asked to stop before: it may be saving'
  fi
}
