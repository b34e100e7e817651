#!/usr/bin/env bash
# Copies this project to the TPU VM and installs it there, with jax for TPU.
#
#   setup_vm.sh [SETTINGS] [PATH...]
#
# Needs project, zone and name, and the type where it is a slice of several hosts. What is
# copied: every file git tracks, as it is in the working tree now, and the PATHs, for
# instance the data of an experiment. A copy stays in runs/tpu/NAME, so that resume.sh sets
# up the same. Run again, it replaces all of it on the TPU VM except runs/; while an
# experiment runs there it changes nothing.

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

read_settings "$@"
need PROJECT ZONE NAME

paths=()
for path in "${ARGUMENTS[@]}"; do
  [[ -e $path ]] || die 2 "there is no file or folder $path"
  path=$(realpath -- "$path")
  [[ $path == "$ROOT"/* ]] || die 2 "$path lies outside of $ROOT; move it inside"
  paths+=("${path#"$ROOT"/}")
done

archive=$RECORD/project.tar.gz
if ((DRY_RUN)); then
  say "# $archive: the files git tracks${paths[*]:+, ${paths[*]}}"
  set_up "$archive.new"
  exit
fi

mkdir -p "$RECORD"
git -C "$ROOT" ls-files -z >"$RECORD/files" || die "$ROOT is not a git repository"
if ((${#paths[@]})); then
  printf '%s\0' "${paths[@]}" >>"$RECORD/files"
fi
tar -czf "$archive.new" -C "$ROOT" --null --verbatim-files-from -T "$RECORD/files"
status=0
set_up "$archive.new" || status=$?
((status != BUSY)) || die "an experiment runs on $NAME; nothing was changed, see stop.sh"
((status == 0)) || die "setting up $NAME failed"
mv "$archive.new" "$archive"
say "$NAME is set up"
