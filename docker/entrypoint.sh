#!/bin/sh
# Runs a container's command; with the secret `cluster_key` (an ssh key) the container is also a node of a cluster.
set -eu

# One key pair is every node's identity, its host key and the only one that may log in.
node() (
    umask 077
    mkdir -p ~/.ssh
    install -m 600 "$1" ~/.ssh/cluster_key
    public=$(ssh-keygen -y -f ~/.ssh/cluster_key)
    echo "$public" > ~/.ssh/authorized_keys
    echo "* $public" > ~/.ssh/known_hosts
    env | grep -E '^[A-Z][A-Z0-9_]*=' > ~/.ssh/environment  # ranks started over ssh get what this container was given
    /usr/sbin/sshd -f /etc/toolkit/sshd_config -h ~/.ssh/cluster_key -E ~/.ssh/sshd.log
    timeout 10 sh -c 'until ssh localhost true 2> /dev/null; do sleep 0.1; done' || {
        echo "error: sshd does not answer on port 2222" >&2
        cat ~/.ssh/sshd.log >&2
        exit 1
    }
)

key=${CLUSTER_KEY:-/run/secrets/cluster_key}
if [ -r "$key" ]; then
    node "$key"
fi
if [ "${1:-}" != deepspeed ]; then
    exec "$@"
fi
# A stopped container gets SIGTERM. `deepspeed` would end at once and its ranks with it: let these save, it follows.
"$@" &
launcher=$!
trap 'pkill -TERM -f -- --local_rank= || kill -TERM "$launcher"' TERM INT
code=0
while
    wait "$launcher" && code=0 || code=$?
    kill -0 "$launcher" 2> /dev/null
do :; done
exit "$code"
