# What up.sh, down.sh and node.sh share. They have BIN and DIR, and are in DIR.
SERVICES=10.96.0.0/16; PODS=10.88.0.0/16; API=10.85.0.11:6443

in_node() { local i=$1 n=$2; shift 2; setsid nsenter --net="/run/netns/ek-node-$i" "$@" >"log/$n.log" 2>&1 </dev/null & echo $! >"pids/$n"; }
end() { local p; [ -f "pids/$1" ] && p=$(cat "pids/$1") && kill "${2:--TERM}" -- "-$p" 2>/dev/null; return 0; }
until_ok() { local what=$1 i; shift; for i in $(seq 240); do "$@" >/dev/null 2>&1 && return; sleep .25; done; echo "$what did not come up; see $DIR/log" >&2; exit 1; }
sign() { openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "pki/$1.key" -out "pki/$1.csr" -subj "$2" 2>/dev/null
  openssl x509 -req -in "pki/$1.csr" -CA pki/ca.crt -CAkey pki/ca.key -CAcreateserial -days 30 -out "pki/$1.crt" -extfile <(echo "subjectAltName=$3") 2>/dev/null; }
# A kubeconfig FILE whose user is given by further words of `kubectl config set-credentials`.
kubeconfig() { local f="$1.kubeconfig"; shift
  kubectl config --kubeconfig "$f" set-cluster c --server "https://$API" --certificate-authority pki/ca.crt --embed-certs >/dev/null
  kubectl config --kubeconfig "$f" set-credentials u "$@" >/dev/null
  kubectl config --kubeconfig "$f" set-context c --cluster c --user u >/dev/null
  kubectl config --kubeconfig "$f" use-context c >/dev/null; }
