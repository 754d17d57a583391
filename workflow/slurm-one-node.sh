#!/usr/bin/env bash
# A SLURM cluster of one node on this machine, for the time of one command:
#
#   workflow/slurm-one-node.sh COMMAND...
#
# From Debian's packages (apt-get install slurm-wlm munge), as root, with all of its state in a temporary folder and
# nothing left behind: no service, no file in /etc. GPUS=2 (the default) pretends two devices, so that what SLURM puts
# into CUDA_VISIBLE_DEVICES can be seen without any. Job accounting is off, as SLURM's own default is.
set -euo pipefail

[ $# -gt 0 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ "$(id -u)" = 0 ] || { echo "slurm-one-node: needs root, for slurmd" >&2; exit 2; }
for tool in munged slurmctld slurmd sbatch; do
  command -v $tool >/dev/null || { echo "slurm-one-node: no $tool: apt-get install slurm-wlm munge" >&2; exit 2; }
done

GPUS=${GPUS:-2}
state=$(mktemp -d -t slurm-one-node.XXXXXX)
host=$(hostname -s)
daemons=()

stop() {
  status=$?
  scancel --user=root >/dev/null 2>&1 || true
  for ((i = ${#daemons[@]} - 1; i >= 0; i--)); do
    kill "${daemons[i]}" 2>/dev/null && wait "${daemons[i]}" 2>/dev/null || true
  done
  if [ "$status" = 0 ]; then rm -rf "$state"; else echo "slurm-one-node: failed, logs in $state" >&2; fi
  exit "$status"
}
trap stop EXIT
trap 'exit 130' INT TERM

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

mkdir -p "$state"/{munge,spool,control}
chmod 755 "$state" "$state/munge"
dd if=/dev/urandom of="$state/munge/key" bs=1024 count=1 status=none
chmod 400 "$state/munge/key"

# Any device file will do: SLURM counts them, it does not open them.
fakes=(/dev/null /dev/zero /dev/full /dev/random)
[ "$GPUS" -le ${#fakes[@]} ] || { echo "slurm-one-node: at most ${#fakes[@]} pretended GPUS" >&2; exit 2; }
: > "$state/gres.conf"
for ((i = 0; i < GPUS; i++)); do echo "NodeName=$host Name=gpu File=${fakes[i]}" >> "$state/gres.conf"; done

cat > "$state/slurm.conf" <<CONF
ClusterName=one-node
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$state/munge/socket
CredType=cred/munge
StateSaveLocation=$state/control
SlurmdSpoolDir=$state/spool
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd.log
MailProg=/bin/true
ReturnToService=2
# No cgroups: a container does not let them be changed.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
KillWait=5
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
MinJobAge=600
$([ "$GPUS" -gt 0 ] && echo "GresTypes=gpu")
DefMemPerCPU=1000
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.95)}' /proc/meminfo) $([ "$GPUS" -gt 0 ] && echo "Gres=gpu:$GPUS") State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF="$state/slurm.conf"
# Snakemake takes SLURM's variables away from its job steps, this one included; elsewhere the file lies in /etc.
mkdir "$state/bin"
printf '#!/bin/sh\nSLURM_CONF=%s exec %s "$@"\n' "$SLURM_CONF" "$(command -v srun)" > "$state/bin/srun"
chmod +x "$state/bin/srun"
export PATH="$state/bin:$PATH"

start() { # program... : ends with this script, however that ends
  setpriv --pdeathsig KILL "$@" > "$state/$1.out" 2>&1 &
  daemons+=($!)
}
start munged --foreground --force --key-file="$state/munge/key" --socket="$state/munge/socket" \
  --pid-file="$state/munge/pid" --log-file="$state/munge/log" --seed-file="$state/munge/seed"
start slurmctld -D -c
start slurmd -D -c -N "$host"

for _ in $(seq 60); do
  [ "$(sinfo --noheader --format=%t 2>/dev/null)" = idle ] && break
  kill -0 "${daemons[@]}" 2>/dev/null || { tail -n 5 "$state"/*.out "$state"/*.log >&2; exit 1; }
  sleep 0.5
done
sinfo --noheader --format='slurm-one-node: node %N is %t, %c cores, %m MB, %G' >&2
[ "$(sinfo --noheader --format=%t)" = idle ] || { tail -n 20 "$state"/*.log >&2; exit 1; }

"$@"
