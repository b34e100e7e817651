#!/usr/bin/env bash
# Starts an experiment on the TPU VM, in the background, and returns.
#
#   launch.sh [SETTINGS] EXPERIMENT [OVERRIDE...]
#   launch.sh experiments.quickstart --out runs/quickstart --seed 1
#
# Needs project, zone, name and type; EXPERIMENT is a module and everything after it goes
# to it as it stands. On a slice of several hosts every host starts it, and two options are
# added where they are missing: --distributed, and --mesh.fsdp -1 if no --mesh. option says
# how to use the chips. The command is recorded in runs/tpu/NAME, where resume.sh finds it.
# With a bucket, runs/ is copied to BUCKET/NAME/runs.tar every five minutes and at the
# end, and comes back from there on a new TPU VM. The same command again is a no-op while
# the experiment runs and after it has finished; after a failure it goes on.

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

read_settings "$@"
need PROJECT ZONE NAME TYPE
((${#ARGUMENTS[@]})) || die 2 "which experiment? such as experiments.quickstart"

experiment=${ARGUMENTS[0]}
check_form EXPERIMENT "$experiment" '[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*'
[[ -e $ROOT/${experiment//.//}.py ]] || die 2 "there is no ${experiment//.//}.py in $ROOT"
distributed=0 mesh=0
for ((i = 1; i < ${#ARGUMENTS[@]}; i++)); do
  case ${ARGUMENTS[i]} in
    --out) out=${ARGUMENTS[i + 1]:-} ;;
    --out=*) out=${ARGUMENTS[i]#--out=} ;;
    --distributed) distributed=1 && continue ;;
    --mesh.*) mesh=1 && continue ;;
    --fresh*) die 2 "--fresh would discard the run at every resume; choose another --out" ;;
    *) continue ;;
  esac
  [[ $out == runs/?* && /$out/ != */../* ]] ||
    die 2 "--out $out: only what lies under runs/ is kept; choose runs/..."
done

added=()
if ((HOSTS > 1)); then
  ((distributed)) || added+=(--distributed)
  ((mesh)) || added+=(--mesh.fsdp -1)
  if ((${#added[@]})); then
    say "# added: ${added[*]}, for one process on each of $HOSTS hosts over all $CHIPS \
chips"
    ARGUMENTS+=("${added[@]}")
  fi
fi

command=("${BUCKET:+$BUCKET/$NAME/runs.tar}" "${ARGUMENTS[@]}")
launch "${command[@]}"
if ((!DRY_RUN)); then
  mkdir -p "$RECORD"
  printf '%s\0' "${command[@]}" >"$RECORD/command"
fi
