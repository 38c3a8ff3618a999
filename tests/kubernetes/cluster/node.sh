#!/usr/bin/env bash
# One node of a cluster that up.sh started in DIR; down.sh takes it away with the rest.
#   node.sh network BIN DIR N           its network namespace, and the ways to and from the others
#   node.sh start   BIN DIR N [TAINT]   containerd, kubelet and kube-proxy in it; TAINT (KEY) keeps pods out from the first moment on
#   node.sh kill    BIN DIR N           SIGKILL to all of it at once, containers too: what stays is what a kernel holds
#   node.sh stop    BIN DIR N           all of it away but the Node, which is the administrator's to delete
set -euo pipefail
WHAT=$1; BIN=$(realpath "$2"); DIR=$(realpath "$3"); i=$4; TAINT=${5:-}; W=$DIR/node-$i
. "$(dirname "$(realpath "$0")")/lib.sh"; cd "$DIR"

network() {
  local others j N="ip -n ek-node-$i"
  others=$(ip netns list | sed -n 's/^ek-node-\([0-9]*\).*/\1/p')
  ip netns add "ek-node-$i"; ip link add "ek-n$i" type veth peer name eth0 netns "ek-node-$i"; ip link set "ek-n$i" master ek0 up
  $N link set lo up; $N addr add "10.85.0.1$i/24" dev eth0; $N link set eth0 up
  $N route add "$SERVICES" dev eth0  # a route for the look-up that precedes the translation to a pod
  ip netns exec "ek-node-$i" sysctl -qw net.ipv4.ip_forward=1
  ip route add "10.88.$i.0/24" via "10.85.0.1$i"
  for j in $others; do $N route add "10.88.$j.0/24" via "10.85.0.1$j"; ip -n "ek-node-$j" route add "10.88.$i.0/24" via "10.85.0.1$i"; done
}

start() {
  sign "kubelet-$i" "/O=system:nodes/CN=system:node:node-$i" "DNS:node-$i"
  kubeconfig "kubelet-$i" --client-certificate "pki/kubelet-$i.crt" --client-key "pki/kubelet-$i.key" --embed-certs
  mkdir -p "$W"/{containerd/root,containerd/state,kubelet,cni,certs.d/_default}
  for c in /sys/fs/cgroup/*/; do [ "$c" = /sys/fs/cgroup/unified/ ] || mkdir -p "$c/ek-node-$i"; done
  cat "/sys/fs/cgroup/cpuset/cpuset.cpus" > "/sys/fs/cgroup/cpuset/ek-node-$i/cpuset.cpus"; cat /sys/fs/cgroup/cpuset/cpuset.mems > "/sys/fs/cgroup/cpuset/ek-node-$i/cpuset.mems"
  cat > "$W/cni/10-pods.conflist" <<C
{"cniVersion":"1.0.0","name":"pods","plugins":[{"type":"bridge","bridge":"pods","isGateway":true,"hairpinMode":true,"ipam":{"type":"host-local","ranges":[[{"subnet":"10.88.$i.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}],"dataDir":"$W/ipam"}},{"type":"portmap","capabilities":{"portMappings":true}}]}
C
  cat > "$W/containerd.toml" <<C
version = 3
root = "$W/containerd/root"
state = "$W/containerd/state"
[grpc]
address = "$W/containerd.sock"
[ttrpc]
address = "$W/containerd.sock.ttrpc"
[plugins."io.containerd.cri.v1.images"]
snapshotter = "overlayfs"
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "localhost/pause:1"
[plugins."io.containerd.cri.v1.images".registry]
config_path = "$W/certs.d"
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
disable_hugetlb_controller = true
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["/usr/lib/cni"]
conf_dir = "$W/cni"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
SystemdCgroup = false
C
  PATH=$BIN:$PATH in_node "$i" "containerd-$i" "$BIN/containerd" --config "$W/containerd.toml"
  for port in $(seq 5000 5009); do
    in_node "$i" "registry-$port-$i" socat TCP-LISTEN:$port,bind=127.0.0.1,fork,reuseaddr "UNIX-CONNECT:$DIR/registry-$port.sock"
  done
  until_ok containerd "$BIN/ctr" -a "$W/containerd.sock" version
  "$BIN/ctr" -a "$W/containerd.sock" -n k8s.io images import "$BIN/pause.tar" >/dev/null
  "$BIN/ctr" -a "$W/containerd.sock" -n k8s.io images label localhost/pause:1 io.cri-containerd.pinned=pinned >/dev/null
  cat > "$W/kubelet.yaml" <<C
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix://$W/containerd.sock
cgroupDriver: cgroupfs
cgroupRoot: /ek-node-$i
failCgroupV1: false
failSwapOn: false
readOnlyPort: 0
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $DIR/pki/ca.crt}}
authorization: {mode: Webhook}
evictionHard: {memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%}
podLogsDir: $W/pods
clusterDomain: cluster.local
clusterDNS: [10.96.0.10]
resolvConf: /dev/null
enforceNodeAllocatable: []
shutdownGracePeriod: 0s
maxPods: 250
nodeLeaseDurationSeconds: 20
C
  [ -z "$TAINT" ] || echo "registerWithTaints: [{key: $TAINT, effect: NoSchedule}]" >> "$W/kubelet.yaml"
  PATH=$BIN:$PATH in_node "$i" "kubelet-$i" "$BIN/kubelet" --config "$W/kubelet.yaml" --kubeconfig "kubelet-$i.kubeconfig" --hostname-override "node-$i" --node-ip "10.85.0.1$i" --root-dir "$W/kubelet" --cert-dir "$W/kubelet/pki"
  in_node "$i" "kube-proxy-$i" "$BIN/kube-proxy" --kubeconfig kube-proxy.kubeconfig --hostname-override "node-$i" --cluster-cidr $PODS --proxy-mode iptables --conntrack-max-per-core 0 --conntrack-tcp-timeout-established 0s --conntrack-tcp-timeout-close-wait 0s
}

# Every process of the node: those in its network, and those in its containers.
processes() { ip netns pids "ek-node-$i" 2>/dev/null; cat $(find /sys/fs/cgroup/pids/ek-node-"$i" -name cgroup.procs 2>/dev/null) /dev/null 2>/dev/null; }

stop() {
  local C n t p
  end "kubelet-$i"; end "kube-proxy-$i"
  C="$BIN/ctr --connect-timeout 2s -a $W/containerd.sock -n k8s.io"
  if [ -f "pids/containerd-$i" ] && [ -d "/proc/$(cat "pids/containerd-$i")" ]; then
    for t in $($C tasks ls -q 2>/dev/null); do $C tasks delete -f "$t" >/dev/null 2>&1; done
    for t in $($C containers ls -q 2>/dev/null); do $C containers rm "$t" >/dev/null 2>&1; done
  fi
  end "containerd-$i"; for p in $(seq 5000 5009); do end "registry-$p-$i"; done
  for p in $(processes); do kill -KILL "$p" 2>/dev/null; done
  grep " $W/" /proc/mounts | cut -d' ' -f2 | sort -r | xargs -r -n1 umount -l 2>/dev/null
  for n in $(ip netns list | sed -n 's/^\(cni-[0-9a-f-]*\).*/\1/p'); do ip -n "$n" -o addr show 2>/dev/null | grep -qF " 10.88.$i." && ip netns del "$n"; done
  ip netns del "ek-node-$i"; ip route del "10.88.$i.0/24" 2>/dev/null
  for n in $(ip netns list | sed -n 's/^\(ek-node-[0-9]*\).*/\1/p'); do ip -n "$n" route del "10.88.$i.0/24" 2>/dev/null; done
  find /sys/fs/cgroup/*/ek-node-"$i" -depth -type d -exec rmdir {} \; 2>/dev/null
  rm -rf "$W" "kubelet-$i.kubeconfig" "pids/containerd-$i" "pids/kubelet-$i" "pids/kube-proxy-$i" pids/registry-*-"$i"
}

case $WHAT in
  network) network ;;
  start) start ;;
  kill) set +e; kill -KILL $(processes); exit 0 ;;
  stop) set +e; stop; exit 0 ;;
  *) echo "see $0" >&2; exit 2 ;;
esac
