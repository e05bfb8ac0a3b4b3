{{/* Names, labels, and what values come to. */}}

{{- define "kvasir.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "kvasir.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "kvasir.labels" -}}
{{ include "kvasir.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: kvasir
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* An image of {repository, tag, digest}: list of it and the default tag. */}}
{{- define "kvasir.image" -}}
{{- $image := index . 0 -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository (default (index . 1) $image.tag) -}}
{{- end -}}
{{- end -}}

{{/* Bytes of a size like 512Mi. */}}
{{- define "kvasir.bytes" -}}
{{- $size := . | toString -}}
{{- $units := dict "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- $number := regexFind "^[0-9]+" $size | int64 -}}
{{- $unit := regexFind "[A-Za-z]+$" $size -}}
{{- if $unit -}}{{- mul $number (get $units $unit) -}}{{- else -}}{{- $number -}}{{- end -}}
{{- end -}}

{{/* What a component has: the root's podDefaults, then each of the rest of the list over it. */}}
{{- define "kvasir.merged" -}}
{{- $result := deepCopy (index . 0).Values.podDefaults -}}
{{- range rest . -}}
{{- $result = mustMergeOverwrite $result (deepCopy .) -}}
{{- end -}}
{{- toJson $result -}}
{{- end -}}

{{/* A pool, complete: list of the root and an entry of pools. */}}
{{- define "kvasir.pool" -}}
{{- include "kvasir.merged" (list (index . 0) (index . 0).Values.poolDefaults (index . 1)) -}}
{{- end -}}

{{- define "kvasir.etcd.endpoints" -}}
{{- if .Values.etcd.enabled -}}
{{- $name := include "kvasir.fullname" . -}}
{{- $endpoints := list -}}
{{- range until (int .Values.etcd.replicas) -}}
{{- $endpoints = append $endpoints (printf "%s-etcd-%d.%s-etcd.%s.svc:2379" $name . $name $.Release.Namespace) -}}
{{- end -}}
{{- toJson $endpoints -}}
{{- else -}}
{{- toJson .Values.etcd.endpoints -}}
{{- end -}}
{{- end -}}

{{- define "kvasir.etcd.prefix" -}}
{{- default (printf "/kvasir/%s/%s" .Release.Namespace .Release.Name) .Values.etcd.prefix -}}
{{- end -}}

{{- define "kvasir.any" -}}
{{- if eq .Values.ipFamily "IPv6" -}}[::]{{- else -}}0.0.0.0{{- end -}}
{{- end -}}

{{- define "kvasir.account" -}}
{{- $root := index . 0 -}}
{{- $part := index . 1 -}}
{{- if $root.Values.serviceAccounts.create -}}
{{- printf "%s-%s" (include "kvasir.fullname" $root) $part -}}
{{- else -}}
{{- default "default" (get $root.Values.serviceAccounts.names $part) -}}
{{- end -}}
{{- end -}}

{{/* SIGTERM to SIGKILL, and what is before: preStop, the grace, ten seconds for leaving (runtime's own limit), and some to spare. */}}
{{- define "kvasir.patience" -}}
{{- add .preStopSeconds .graceSeconds 15 -}}
{{- end -}}

{{/* Settings that all services have: root and component. As JSON. They wait for an etcd that starts with them. */}}
{{- define "kvasir.config.common" -}}
{{- $root := index . 0 -}}
{{- $part := index . 1 -}}
{{- $any := include "kvasir.any" $root -}}
{{- $config := dict
      "admin" (dict "listen" (printf "%s:%v" $any $part.ports.admin))
      "log" (dict "format" $root.Values.log.format "filter" $root.Values.log.filter)
      "shutdown" (dict "grace_ms" (mul $part.graceSeconds 1000))
      "registry" (dict "etcd" (dict
        "endpoints" (include "kvasir.etcd.endpoints" $root | fromJsonArray)
        "prefix" (include "kvasir.etcd.prefix" $root)
        "connect_timeout_ms" 60000))
-}}
{{- with $root.Values.etcd -}}
{{- if .tls.secret -}}
{{- $tls := dict "authority" "/etc/kvasir/etcd/ca.crt" -}}
{{- if .tls.clientCertificate -}}
{{- $_ := set $tls "certificate" "/etc/kvasir/etcd/tls.crt" -}}
{{- $_ := set $tls "key" "/etc/kvasir/etcd/tls.key" -}}
{{- end -}}
{{- with .tls.serverName -}}{{- $_ := set $tls "server_name" . -}}{{- end -}}
{{- $_ := set $config.registry.etcd "tls" $tls -}}
{{- end -}}
{{- with .auth.username -}}
{{- $_ := set $config.registry.etcd "username" . -}}
{{- $_ := set $config.registry.etcd "password_file" (printf "/etc/kvasir/etcd-user/%s" $root.Values.etcd.auth.passwordSecret.key) -}}
{{- end -}}
{{- end -}}
{{- with $root.Values.operator.tokensSecret -}}
{{- if .name -}}
{{- $_ := set $config "operator" (dict "tokens_file" (printf "/etc/kvasir/operators/%s" .key)) -}}
{{- end -}}
{{- end -}}
{{- with $root.Values.tls.rpc -}}
{{- if .secret -}}
{{- $_ := set $config "rpc" (dict "tls" (dict
      "certificate" "/etc/kvasir/rpc/tls.crt" "key" "/etc/kvasir/rpc/tls.key" "authority" "/etc/kvasir/rpc/ca.crt"
      "server_name" .serverName)) -}}
{{- end -}}
{{- end -}}
{{- toJson $config -}}
{{- end -}}

{{/* Settings of those who move blocks: root and component. As JSON. */}}
{{- define "kvasir.config.transfer" -}}
{{- $root := index . 0 -}}
{{- $part := index . 1 -}}
{{- $any := include "kvasir.any" $root -}}
{{- $ucx := dict "listen" (printf "%s:%v" $any $part.ports.ucx) -}}
{{- if and $part.rdma.enabled $part.rdma.netDevices -}}
{{- $_ := set $ucx "net_devices" $part.rdma.netDevices -}}
{{- end -}}
{{- $transfer := dict "listen" (printf "%s:%v" $any $part.ports.transfer) "ucx" $ucx -}}
{{- if $part.hugePages.size -}}
{{- $_ := set $transfer "huge_pages" "require" -}}
{{- end -}}
{{- with $root.Values.tls.transfer -}}
{{- if .secret -}}
{{- $_ := set $transfer "tls" (dict
      "certificate" "/etc/kvasir/transfer/tls.crt" "key" "/etc/kvasir/transfer/tls.key"
      "authority" "/etc/kvasir/transfer/ca.crt" "server_name" .serverName) -}}
{{- end -}}
{{- end -}}
{{- toJson $transfer -}}
{{- end -}}

{{/* A volume's name for a model. */}}
{{- define "kvasir.model.slug" -}}
{{- printf "%s-%s" (regexReplaceAll "[^a-z0-9]+" (lower .) "-" | trunc 40 | trimAll "-") (sha256sum . | trunc 6) -}}
{{- end -}}
