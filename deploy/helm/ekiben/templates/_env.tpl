{{/* The variables of a container, with the user's own in the place of ours: (dict "root" . "component" "registry"). */}}
{{- define "ekiben.env" -}}
{{- $ours := include "ekiben.variables" . | fromYaml -}}
env:
  {{- range $name, $value := merge (deepCopy .root.Values.env) $ours }}
  - name: {{ $name }}
    value: {{ $value | toString | quote }}
  {{- end }}
{{- end -}}

{{- define "ekiben.variables" -}}
{{- $values := .root.Values -}}
TMPDIR: /tmp
HOME: /tmp
{{- /* Of all that mount the login: the deployer reads images and their signatures. */}}
{{- if and $values.images.pushSecret (has .component (list "platform" "deployer" "builder")) }}
REGISTRY_AUTH_FILE: /etc/ekiben/login/.dockerconfigjson
{{- end }}
{{- if eq .component "platform" }}
{{ include "ekiben.standaloneVariables" .root }}
{{ include "ekiben.deployerVariables" .root }}
{{ include "ekiben.builderVariables" .root }}
{{ include "ekiben.gatewayVariables" .root }}
{{- else }}
{{ include "ekiben.serviceVariables" . }}
{{- if eq .component "registry" }}
EKIBEN_REGISTRY_BLOBS_URL: {{ required "mode distributed needs blobs.url: s3://bucket/prefix" $values.blobs.url | quote }}
EKIBEN_REGISTRY_BLOBS_DIRECT: {{ $values.blobs.direct | quote }}
EKIBEN_REGISTRY_BLOBS_LISTEN: 0.0.0.0:7402
EKIBEN_REGISTRY_SECRETS_KEY_FILE: /etc/ekiben/secrets/secrets.key
EKIBEN_REGISTRY_ADMIN_TOKEN_FILE: /etc/ekiben/secrets/admin-token
{{- else if eq .component "recorder" }}
EKIBEN_RECORDER_OTLP_HTTP_LISTEN: 0.0.0.0:4318
EKIBEN_RECORDER_OTLP_TOKEN_FILE: /etc/ekiben/secrets/otlp-token
{{- else if eq .component "deployer" }}
EKIBEN_DEPLOYER_DATA_DIR: /var/lib/ekiben
EKIBEN_DEPLOYER_RUN_DIR: /run/ekiben
EKIBEN_DEPLOYER_OTLP_HTTP_ENDPOINT: http://{{ include "ekiben.host" (list .root "recorder") }}:4318
EKIBEN_DEPLOYER_OTLP_TOKEN_FILE: /etc/ekiben/secrets/otlp-token
EKIBEN_DEPLOYER_SECRETS_KEY_FILE: /etc/ekiben/secrets/secrets.key
{{ include "ekiben.deployerVariables" .root }}
{{- else if eq .component "builder" }}
EKIBEN_BUILDER_DATA_DIR: /var/lib/ekiben
EKIBEN_BUILDER_RUN_DIR: /run/ekiben
EKIBEN_BUILDER_IMAGES_LISTEN: 0.0.0.0:7403
{{ include "ekiben.builderVariables" .root }}
{{- else }}
EKIBEN_GATEWAY_DATA_DIR: /var/lib/ekiben
EKIBEN_GATEWAY_RUN_DIR: /run/ekiben
EKIBEN_GATEWAY_HOST: 0.0.0.0
EKIBEN_GATEWAY_PORT: "7400"
{{ include "ekiben.gatewayVariables" .root }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "ekiben.standaloneVariables" -}}
{{- with .Values.database.url -}}
EKIBEN_DATABASE_URL: {{ . | quote }}
{{ end -}}
{{- if .Values.database.passwordSecret.name -}}
EKIBEN_DATABASE_PASSWORD_FILE: /etc/ekiben/database/{{ .Values.database.passwordSecret.key }}
{{ end -}}
{{- with .Values.blobs.url -}}
EKIBEN_BLOBS_URL: {{ . | quote }}
{{ end -}}
EKIBEN_REGISTRY_BLOBS_DIRECT: {{ .Values.blobs.direct | quote }}
EKIBEN_RECORDER_OTLP_HTTP_LISTEN: 0.0.0.0:4318
EKIBEN_DEPLOYER_OTLP_HTTP_ENDPOINT: http://{{ include "ekiben.host" (list . "telemetry") }}:4318
{{- end -}}

{{- define "ekiben.deployerVariables" -}}
EKIBEN_DEPLOYER_RUNTIME: kubernetes
EKIBEN_DEPLOYER_KUBERNETES_NAMESPACE: {{ include "ekiben.replicasNamespace" . | quote }}
{{- if not .Values.replicas.terminals }}
EKIBEN_DEPLOYER_TERMINALS: "off"
{{- end }}
{{- if not .Values.images.registry }}
EKIBEN_DEPLOYER_KUBERNETES_PULL_HOST: {{ required "images.registry, images.pullHost or images.nodePort must say where nodes pull images from" (include "ekiben.pullHost" .) | quote }}
{{- end }}
{{- with .Values.images.pullSecret }}
EKIBEN_DEPLOYER_KUBERNETES_PULL_SECRET: {{ . | quote }}
{{- end }}
{{- if eq (include "ekiben.replicasNamespace" .) .Release.Namespace }}
# By its number: an HTTPRoute takes no name.
EKIBEN_DEPLOYER_KUBERNETES_GATEWAY_SERVICE: "{{ include "ekiben.fullname" . }}:{{ .Values.service.port }}"
{{- end }}
EKIBEN_DEPLOYER_PUBLIC_URL: {{ .Values.publicUrl | quote }}
EKIBEN_DEPLOYER_DOMAIN: {{ .Values.domain | quote }}
EKIBEN_DEPLOYER_PORT_RANGE: none
{{- end -}}

{{- define "ekiben.builderVariables" -}}
{{- with .Values.images.registry -}}
EKIBEN_BUILDER_IMAGES: {{ . | quote }}
{{ end -}}
{{- with .Values.images.bases -}}
EKIBEN_BUILDER_BASES: {{ . | quote }}
{{ end -}}
{{- end -}}

{{- define "ekiben.gatewayVariables" -}}
EKIBEN_GATEWAY_DOMAIN: {{ .Values.domain | quote }}
{{- /* The API's own name may be below the domain of deployments. */}}
{{- $host := regexReplaceAll ":[0-9]+$" (urlParse .Values.publicUrl).host "" }}
{{- $own := hasSuffix (printf ".%s" .Values.domain) $host | ternary (list $host) list }}
{{- with concat .Values.apiHosts $own | uniq }}
EKIBEN_GATEWAY_API_HOSTS: {{ join "," . | quote }}
{{- end }}
EKIBEN_GATEWAY_TRUSTED_HOPS: {{ .Values.trustedHops | quote }}
{{- end -}}

{{/* What every service of distributed is told: where it listens, and where the others are. */}}
{{- define "ekiben.serviceVariables" -}}
{{- $root := .root -}}
EKIBEN_SERVER_LISTEN: 0.0.0.0:7401
EKIBEN_SERVER_METRICS_LISTEN: 0.0.0.0:9090
EKIBEN_SERVER_LOG_FORMAT: json
EKIBEN_SERVER_SERVICE_TOKEN_FILE: /etc/ekiben/secrets/service-token
EKIBEN_SERVER_OTLP_ENDPOINT: {{ include "ekiben.host" (list $root "recorder") }}:7401
EKIBEN_PEERS_SERVICE_TOKEN_FILE: /etc/ekiben/secrets/service-token
{{- range list "registry" "builder" "deployer" "recorder" }}
EKIBEN_PEERS_{{ upper . }}: {{ include "ekiben.host" (list $root .) }}:7401
{{- end }}
EKIBEN_PEERS_BLOBS: http://{{ include "ekiben.host" (list $root "registry") }}:7402
EKIBEN_PEERS_IMAGES: http://{{ include "ekiben.host" (list $root "builder") }}:7403
{{- if ne .component "gateway" }}
{{- $prefix := printf "EKIBEN_%s" (upper .component) }}
{{ $prefix }}_DATABASE_URL: {{ include "ekiben.database" (list $root .component) | quote }}
{{- if $root.Values.database.passwordSecret.name }}
{{ $prefix }}_DATABASE_PASSWORD_FILE: /etc/ekiben/database/{{ $root.Values.database.passwordSecret.key }}
{{- end }}
{{- end }}
{{- end -}}
