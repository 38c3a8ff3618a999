{{- define "ekiben.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "ekiben.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "ekiben.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "ekiben.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "ekiben.selector" -}}
app.kubernetes.io/name: {{ include "ekiben.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "ekiben.labels" -}}
{{ include "ekiben.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: ekiben
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "ekiben.replicasNamespace" -}}
{{- default .Release.Namespace .Values.replicas.namespace -}}
{{- end -}}

{{- define "ekiben.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}
{{- end -}}

{{- define "ekiben.secret" -}}
{{- default (include "ekiben.fullname" .) .Values.secrets.existing -}}
{{- end -}}

{{/* The host of a service of the suite: (list . "registry"). */}}
{{- define "ekiben.host" -}}
{{- $root := index . 0 -}}
{{ include "ekiben.fullname" $root }}-{{ index . 1 }}.{{ $root.Release.Namespace }}.svc.{{ $root.Values.clusterDomain }}
{{- end -}}

{{/* PostgreSQL's URL for a service: (list . "registry"). */}}
{{- define "ekiben.database" -}}
{{- $root := index . 0 -}}
{{- $url := required "mode distributed needs database.url: postgresql://user@host/name" $root.Values.database.url -}}
{{ $url }}{{ contains "?" $url | ternary "&" "?" }}schema=ekiben_{{ index . 1 }}
{{- end -}}

{{- define "ekiben.pullHost" -}}
{{- if .Values.images.pullHost -}}
{{- .Values.images.pullHost -}}
{{- else if .Values.images.nodePort -}}
127.0.0.1:{{ .Values.images.nodePort }}
{{- end -}}
{{- end -}}

{{/* The head of every pod: (dict "root" . "component" "registry" "token" false). */}}
{{- define "ekiben.pod" -}}
{{- $root := .root -}}
serviceAccountName: {{ include "ekiben.fullname" $root }}{{ if not .token }}-plain{{ end }}
automountServiceAccountToken: {{ .token }}
enableServiceLinks: false
terminationGracePeriodSeconds: {{ $root.Values.terminationGracePeriodSeconds }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- with $root.Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $root.Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $root.Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $root.Values.topologySpreadConstraints }}
topologySpreadConstraints: {{- toYaml . | nindent 2 }}
{{- else }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "ekiben.selector" $root | nindent 8 }}
        app.kubernetes.io/component: {{ .component }}
{{- end }}
{{- with $root.Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{- define "ekiben.podMetadata" -}}
labels:
  {{- include "ekiben.labels" .root | nindent 2 }}
  app.kubernetes.io/component: {{ .component }}
  {{- with .root.Values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .root.Values.podAnnotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* What every container has. */}}
{{- define "ekiben.container" -}}
image: {{ include "ekiben.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
terminationMessagePolicy: FallbackToLogsOnError
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{- define "ekiben.envFrom" -}}
{{- if or .Values.envFrom .Values.blobs.credentialsSecret }}
envFrom:
  {{- with .Values.blobs.credentialsSecret }}
  - secretRef: {name: {{ . }}}
  {{- end }}
  {{- with .Values.envFrom }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Variables that a user gave, last, so that they win. */}}
{{- define "ekiben.extraEnv" -}}
{{- range $name, $value := .Values.env }}
- name: {{ $name }}
  value: {{ $value | toString | quote }}
{{- end }}
{{- end -}}

{{/* Settings of the deployer, builder and gateway that both modes have. */}}
{{- define "ekiben.deployerEnv" -}}
- name: EKIBEN_DEPLOYER_RUNTIME
  value: kubernetes
- name: EKIBEN_DEPLOYER_KUBERNETES_NAMESPACE
  value: {{ include "ekiben.replicasNamespace" . }}
{{- if not .Values.images.registry }}
- name: EKIBEN_DEPLOYER_KUBERNETES_PULL_HOST
  value: {{ required "images.registry, images.pullHost or images.nodePort must say where nodes pull images from" (include "ekiben.pullHost" .) | quote }}
{{- end }}
{{- with .Values.images.pullSecret }}
- name: EKIBEN_DEPLOYER_KUBERNETES_PULL_SECRET
  value: {{ . }}
{{- end }}
{{- if eq (include "ekiben.replicasNamespace" .) .Release.Namespace }}
- name: EKIBEN_DEPLOYER_KUBERNETES_GATEWAY_SERVICE
  # By its number: an HTTPRoute takes no name.
  value: "{{ include "ekiben.fullname" . }}:{{ .Values.service.port }}"
{{- end }}
- name: EKIBEN_DEPLOYER_PUBLIC_URL
  value: {{ .Values.publicUrl | quote }}
- name: EKIBEN_DEPLOYER_DOMAIN
  value: {{ .Values.domain | quote }}
- name: EKIBEN_DEPLOYER_PORT_RANGE
  value: none
{{- end -}}

{{- define "ekiben.builderEnv" -}}
{{- with .Values.images.registry }}
- name: EKIBEN_BUILDER_IMAGES
  value: {{ . | quote }}
{{- end }}
{{- with .Values.images.bases }}
- name: EKIBEN_BUILDER_BASES
  value: {{ . | quote }}
{{- end }}
{{- if .Values.images.pushSecret }}
- name: REGISTRY_AUTH_FILE
  value: /etc/ekiben/login/.dockerconfigjson
{{- end }}
{{- end -}}

{{- define "ekiben.gatewayEnv" -}}
- name: EKIBEN_GATEWAY_DOMAIN
  value: {{ .Values.domain | quote }}
{{- with .Values.apiHosts }}
- name: EKIBEN_GATEWAY_API_HOSTS
  value: {{ join "," . | quote }}
{{- end }}
- name: EKIBEN_GATEWAY_TRUSTED_HOPS
  value: {{ .Values.trustedHops | quote }}
{{- end -}}

{{/* What every service of distributed is told: where it listens, and where the others are. */}}
{{- define "ekiben.serviceEnv" -}}
{{- $root := .root -}}
- name: TMPDIR
  value: /tmp
- name: HOME
  value: /tmp
- name: EKIBEN_SERVER_LISTEN
  value: 0.0.0.0:7401
- name: EKIBEN_SERVER_METRICS_LISTEN
  value: 0.0.0.0:9090
- name: EKIBEN_SERVER_LOG_FORMAT
  value: json
- name: EKIBEN_SERVER_SERVICE_TOKEN_FILE
  value: /etc/ekiben/secrets/service-token
- name: EKIBEN_SERVER_OTLP_ENDPOINT
  value: {{ include "ekiben.host" (list $root "recorder") }}:7401
- name: EKIBEN_PEERS_SERVICE_TOKEN_FILE
  value: /etc/ekiben/secrets/service-token
{{- range list "registry" "builder" "deployer" "recorder" }}
- name: EKIBEN_PEERS_{{ upper . }}
  value: {{ include "ekiben.host" (list $root .) }}:7401
{{- end }}
- name: EKIBEN_PEERS_BLOBS
  value: http://{{ include "ekiben.host" (list $root "registry") }}:7402
- name: EKIBEN_PEERS_IMAGES
  value: http://{{ include "ekiben.host" (list $root "builder") }}:7403
{{- if ne .component "gateway" }}
{{- $prefix := printf "EKIBEN_%s" (upper .component) }}
- name: {{ $prefix }}_DATABASE_URL
  value: {{ include "ekiben.database" (list $root .component) | quote }}
{{- if $root.Values.database.passwordSecret.name }}
- name: {{ $prefix }}_DATABASE_PASSWORD_FILE
  value: /etc/ekiben/database/{{ $root.Values.database.passwordSecret.key }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "ekiben.mounts" -}}
- {name: tmp, mountPath: /tmp}
{{- if .secrets }}
- {name: secrets, mountPath: /etc/ekiben/secrets, readOnly: true}
{{- end }}
{{- if .root.Values.database.passwordSecret.name }}
- {name: database, mountPath: /etc/ekiben/database, readOnly: true}
{{- end }}
{{- if and .login .root.Values.images.pushSecret }}
- {name: login, mountPath: /etc/ekiben/login, readOnly: true}
{{- end }}
{{- with .root.Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "ekiben.volumes" -}}
- name: tmp
  emptyDir: {}
{{- if .secrets }}
- name: secrets
  secret:
    secretName: {{ include "ekiben.secret" .root }}
    defaultMode: 288
    items:
      {{- range .secrets }}
      - {key: {{ . }}, path: {{ . }}}
      {{- end }}
{{- end }}
{{- if .root.Values.database.passwordSecret.name }}
- name: database
  secret:
    secretName: {{ .root.Values.database.passwordSecret.name }}
    defaultMode: 288
{{- end }}
{{- if and .login .root.Values.images.pushSecret }}
- name: login
  secret:
    secretName: {{ .root.Values.images.pushSecret }}
    defaultMode: 288
{{- end }}
{{- with .root.Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Probes of a service that serves them beside its metrics; it has started once it answers this path. */}}
{{- define "ekiben.probes" -}}
startupProbe:
  httpGet: {path: {{ . }}, port: metrics}
  periodSeconds: 2
  timeoutSeconds: 5
  failureThreshold: 150
readinessProbe:
  httpGet: {path: /readyz, port: metrics}
  periodSeconds: 5
  timeoutSeconds: 5
livenessProbe:
  httpGet: {path: /livez, port: metrics}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 6
{{- end -}}
