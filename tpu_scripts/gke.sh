#!/usr/bin/env bash
# A run on TPU slices of a GKE cluster, as a JobSet (https://jobset.sigs.k8s.io), which starts all pods again when one ends.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'HELP'
gke.sh COMMAND OPTIONS [-- MORE ARGUMENTS OF babel train]

  create    rehearses CONFIG on this machine, and makes the JobSet, which trains, and begins again after a preemption until the run is finished
  log       follows the log of the first pod
  delete    the JobSet, if this script created it

  --name NAME --context CONTEXT                 the JobSet, and the cluster as kubectl names it (all commands)
  --namespace NAMESPACE                         (default)
  --image IMAGE                                 a container image with babel on its PATH: the Dockerfile makes one
  --accelerator KIND --topology TOPOLOGY        tpu-v5p-slice and 4x4x4, for example
  --chips N --hosts N --slices N                chips of a host, hosts of a slice, slices (1)
  --config FILE                                 a config on this machine, which goes into the manifest; else its path in the pods
  --out FOLDER --data FOLDER                    run folder, and data.folder: in a bucket (gs:// or s3://), or below /data (--data where the
                                                config does not say it)
  --claim NAME                                  a PersistentVolumeClaim that all pods mount at /data; not needed where all is in buckets
  --service-account NAME                        of Kubernetes, whose rights on the bucket the pods have (Workload Identity)
  --secrets NAME,...                            Secrets of Kubernetes whose keys become environment variables
  --no-rehearsal, --devices N, --babel COMMAND  skip the rehearsal; its CPU devices (16); the babel of this machine
  --restarts N                                  at most (100)
  --dry-run                                     print the commands and the manifest
HELP
}

name='' context='' namespace=default image='' accelerator='' topology='' chips='' hosts='' slices=1 claim='' config='' out='' data='' restarts=100
service_account='' secrets='' devices='' babel=babel no_rehearsal=false
parse "name context namespace image accelerator topology chips hosts slices claim config out data restarts service_account secrets devices babel" \
    "no_rehearsal" "$@"
need name context
check_name "$name"
settings_of_options
secret_names '^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$' 'the name of a Secret'
kubectl=(kubectl --context="$context" --namespace="$namespace")
label=app.kubernetes.io/managed-by
creator="babel-jax-scripts"

# A string of YAML (which reads JSON's double-quoted ones).
yaml() {
    local text=${1//\\/\\\\}
    text=${text//\"/\\\"}
    [[ $text != *$'\n'* ]] || die "line breaks in $1"
    printf '"%s"' "$text"
}

manifest() {
    # SIGTERM comes to the first process of a container alone, which is this shell: it passes it on, and waits for the checkpoint. babel
    # then ends with 0, and the pod counts as done only with the summary of a finished run.
    local train='' theirs=$config one
    if [[ -f $config ]]; then
        theirs=/tmp/babel-run.toml
        train="printf %s \"\$BABEL_CONFIG\" | base64 -d >$theirs && "
    fi
    train+="trap 'kill \$!' TERM; $(quoted babel train "$theirs" "${settings[@]}" ${arguments[@]+"${arguments[@]}"}) &"
    if is_url "$out"; then
        train+=" { wait \$! || wait \$!; } && $(quoted babel status "$out") | grep -q ^finished"
    else
        train+=" { wait \$! || wait \$!; } && test -s $(quoted "$out/summary.json")"
    fi
    cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  labels:
    $label: $creator
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: $slices
    template:
      spec:
        backoffLimit: 0
        # What babel refuses, it would refuse again.
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: train
              operator: In
              values: [2]
        completionMode: Indexed
        parallelism: $hosts
        completions: $hosts
        template:
          spec:
            restartPolicy: Never
            securityContext:
              seccompProfile:
                type: RuntimeDefault
            terminationGracePeriodSeconds: 120
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $(yaml "$accelerator")
              cloud.google.com/gke-tpu-topology: $(yaml "$topology")
$(if [[ -n $service_account ]]; then printf '            serviceAccountName: %s' "$(yaml "$service_account")"; fi)
            containers:
            - name: train
              image: $(yaml "$image")
              command: [bash, -c, $(yaml "$train")]
              securityContext:
                allowPrivilegeEscalation: false
                capabilities:
                  drop: [ALL]
              ports:
              - containerPort: 8471
              - containerPort: 8482
              resources:
                limits:
                  google.com/tpu: $chips
YAML
    if [[ -f $config ]]; then
        cat <<YAML
              env:
              - name: BABEL_CONFIG
                value: $(base64 -w 0 "$config")
YAML
    fi
    if [[ -n $secrets ]]; then
        printf '              envFrom:\n'
        for one in "${names[@]}"; do printf '              - secretRef:\n                  name: %s\n' "$(yaml "$one")"; done
    fi
    if [[ -z $claim ]]; then return; fi
    cat <<YAML
              volumeMounts:
              - name: data
                mountPath: /data
            volumes:
            - name: data
              persistentVolumeClaim:
                claimName: $(yaml "$claim")
YAML
}

create() {
    need image accelerator topology chips hosts config out
    # Without a disk that all share, what is not in a bucket is nowhere.
    if ! { is_url "$out" && [[ -f $config && (-z $data || $data == *://*) ]]; }; then need claim; fi
    for number in chips hosts slices restarts; do check_number "$number" "${!number}"; done
    rehearse
    local text
    text=$(manifest)
    if $dry_run; then
        printf '%s\n%s\n' "$(quoted "${kubectl[@]}" create --filename=-)" "$text"
    else
        "${kubectl[@]}" create --filename=- <<<"$text"
    fi
}

follow() {
    local first="jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    change "${kubectl[@]}" logs --follow --tail=100 --selector="$first"
}

delete() {
    local found
    found=$("${kubectl[@]}" get jobset "$name" --output="jsonpath={.metadata.labels['app\.kubernetes\.io/managed-by']}") || die "no JobSet $name"
    [[ $found == "$creator" ]] || die "JobSet $name was not created by this script (no label $label=$creator); delete it with kubectl"
    change "${kubectl[@]}" delete jobset "$name"
}

case $command in
create | delete) "$command" ;;
log) follow ;;
*) die "unknown command $command; see --help" ;;
esac
