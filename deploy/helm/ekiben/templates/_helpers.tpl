{{- define "ekiben.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Begins every name: a Service's has no dots and begins with a letter; what is cut off is told apart by its digest. */}}
{{- define "ekiben.fullname" -}}
{{- $name := .Release.Name -}}
{{- if .Values.fullnameOverride -}}
{{- $name = .Values.fullnameOverride -}}
{{- else if not (contains (include "ekiben.name" .) .Release.Name) -}}
{{- $name = printf "%s-%s" .Release.Name (include "ekiben.name" .) -}}
{{- end -}}
{{- $plain := $name | replace "." "-" -}}
{{- if regexMatch "^[^a-z]" $plain -}}
{{- $plain = printf "ekiben-%s" $plain -}}
{{- end -}}
{{- if or (gt (len $plain) 40) (contains "." $name) -}}
{{- $plain = printf "%s-%s" ($plain | trunc 31 | trimSuffix "-") ($name | sha256sum | trunc 8) -}}
{{- end -}}
{{- $plain -}}
{{- end -}}

{{/* By which Services find the platform's pods. The last one no pod of a deployment can have: the deployer refuses it. */}}
{{- define "ekiben.selector" -}}
app.kubernetes.io/name: {{ include "ekiben.name" . }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
ekiben.dev/platform: {{ include "ekiben.fullname" . }}
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

{{/* Probes of a service that serves them beside its metrics, by the path of its readiness. */}}
{{- define "ekiben.probes" -}}
startupProbe:
  httpGet: {path: {{ . | quote }}, port: metrics}
  periodSeconds: 2
  timeoutSeconds: 5
  failureThreshold: 150
readinessProbe:
  httpGet: {path: {{ . | quote }}, port: metrics}
  periodSeconds: 5
  timeoutSeconds: 5
livenessProbe:
  httpGet: {path: /livez, port: metrics}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 6
{{- end -}}
