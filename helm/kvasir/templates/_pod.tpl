{{/* The pod of any of the services. */}}

{{/* Where a model's folder is in the container: list of its name and its source. */}}
{{- define "kvasir.model.path" -}}
{{- $source := index . 1 -}}
{{- if $source.path -}}
{{- $source.path -}}
{{- else -}}
{{- printf "/models/%s" (include "kvasir.model.slug" (index . 0)) -}}
{{- end -}}
{{- end -}}

{{/* Volumes of a model: name, source. */}}
{{- define "kvasir.model.volumes" -}}
{{- $name := printf "model-%s" (include "kvasir.model.slug" (index . 0)) -}}
{{- $source := index . 1 -}}
{{- if $source.pvc }}
- name: {{ $name }}
  persistentVolumeClaim:
    claimName: {{ $source.pvc.claimName }}
    readOnly: true
{{- else if $source.hostPath }}
- name: {{ $name }}
  hostPath:
    path: {{ $source.hostPath.path }}
    type: Directory
{{- else if $source.image }}
- name: {{ $name }}
  image:
    reference: {{ $source.image.reference }}
    pullPolicy: {{ default "IfNotPresent" $source.image.pullPolicy }}
{{- else if $source.download }}
- name: {{ $name }}
  {{- if $source.download.volume }}
  {{- toYaml $source.download.volume | nindent 2 }}
  {{- else }}
  emptyDir:
    {{- if not (or $source.download.sizeLimit $source.download.medium) }} {}{{ end }}
    {{- with $source.download.sizeLimit }}
    sizeLimit: {{ . }}
    {{- end }}
    {{- with $source.download.medium }}
    medium: {{ . }}
    {{- end }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Mounts of a model: name, source. */}}
{{- define "kvasir.model.mounts" -}}
{{- $source := index . 1 -}}
{{- if not $source.path }}
- name: model-{{ include "kvasir.model.slug" (index . 0) }}
  mountPath: {{ include "kvasir.model.path" . }}
  readOnly: true
  {{- with (default (default dict $source.image) $source.pvc).subPath }}
  subPath: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* The init container that downloads a model: name, source, security context. */}}
{{- define "kvasir.model.download" -}}
{{- $source := index . 1 -}}
{{- with $source.download }}
- name: fetch-{{ include "kvasir.model.slug" (index $ 0) }}
  image: {{ .image }}
  {{- with .command }}
  command: {{ toJson . }}
  {{- end }}
  {{- with .args }}
  args: {{ toJson . }}
  {{- end }}
  env:
    - name: HOME
      value: /tmp
    {{- with .env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .envFrom }}
  envFrom:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .resources }}
  resources:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- toYaml (index $ 2) | nindent 4 }}
  volumeMounts:
    - name: model-{{ include "kvasir.model.slug" (index $ 0) }}
      mountPath: /model
    - name: tmp
      mountPath: /tmp
{{- end }}
{{- end -}}

{{/*
metadata and spec of a pod. A dict:
  root, part (merged values), component (label), account (key), command, config (name of the ConfigMap), checksum,
  id (a fieldRef), ports (name → number), models (list of [name, source]), volumes, mounts (YAML lists), labels (more)
*/}}
{{- define "kvasir.pod" -}}
{{- $root := .root -}}
{{- $part := .part -}}
{{- $image := mustMergeOverwrite (deepCopy $root.Values.image) $part.image -}}
{{- $limits := dict -}}
{{- with $part.gpu -}}
{{- if .count -}}{{- $_ := set $limits .resource (.count | toString) -}}{{- end -}}
{{- end -}}
{{- $security := deepCopy $part.securityContext -}}
{{- with $part.rdma -}}
{{- if .enabled -}}
{{- if .resource -}}{{- $_ := set $limits .resource (.count | toString) -}}{{- end -}}
{{- if .ipcLock -}}
{{- $capabilities := default dict $security.capabilities -}}
{{- $_ := set $capabilities "add" (append (default list $capabilities.add) "IPC_LOCK" | uniq) -}}
{{- $_ := set $security "capabilities" $capabilities -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- with $part.hugePages -}}
{{- if .size -}}{{- $_ := set $limits (printf "hugepages-%s" .size) (.amount | toString) -}}{{- end -}}
{{- end -}}
{{- $resources := deepCopy (default dict $part.resources) -}}
{{- if $limits -}}
{{- $_ := set $resources "limits" (merge (default dict $resources.limits) $limits) -}}
{{- $_ := set $resources "requests" (merge (default dict $resources.requests) $limits) -}}
{{- end -}}
metadata:
  labels:
    {{- include "kvasir.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
    {{- with merge (default dict .labels) $part.labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    checksum/config: {{ .checksum }}
    {{- with $part.annotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "kvasir.account" (list $root .account) }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "kvasir.patience" $part }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if $part.hostNetwork }}
  hostNetwork: true
  dnsPolicy: ClusterFirstWithHostNet
  {{- end }}
  securityContext:
    {{- toYaml $part.podSecurityContext | nindent 4 }}
  {{- with $part.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $part.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $part.schedulerName }}
  schedulerName: {{ . }}
  {{- end }}
  {{- with $part.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $part.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $part.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if $part.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- range $part.topologySpreadConstraints }}
    {{- $constraint := deepCopy . }}
    {{- if not (hasKey $constraint "labelSelector") }}
    {{- $match := mustMergeOverwrite (include "kvasir.selector" $root | fromYaml) (dict "app.kubernetes.io/component" $.component) (default dict $.labels) }}
    {{- $_ := set $constraint "labelSelector" (dict "matchLabels" $match) }}
    {{- end }}
    - {{- toYaml $constraint | nindent 6 }}
    {{- end }}
  {{- end }}
  {{- $fetch := "" }}
  {{- range .models }}
  {{- $fetch = print $fetch (include "kvasir.model.download" (list (index . 0) (index . 1) $part.securityContext)) }}
  {{- end }}
  {{- if or $part.initContainers $fetch }}
  initContainers:
    {{- with $part.initContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- with $fetch }}
    {{- . | nindent 4 }}
    {{- end }}
  {{- end }}
  containers:
    - name: {{ .command }}
      image: {{ include "kvasir.image" (list $image $root.Chart.AppVersion) }}
      imagePullPolicy: {{ $image.pullPolicy }}
      command: [{{ .command }}]
      args: [--config=/etc/kvasir/config/config.yaml]
      env:
        - name: POD_IP
          valueFrom:
            fieldRef:
              fieldPath: status.podIP
        - name: KVASIR_ID
          valueFrom:
            fieldRef:
              fieldPath: {{ .id }}
        - name: KVASIR_ADVERTISE
          value: {{ ternary "[$(POD_IP)]" "$(POD_IP)" (eq $root.Values.ipFamily "IPv6") | quote }}
        {{- with $part.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        {{- range $name, $port := .ports }}
        - name: {{ $name }}
          containerPort: {{ $port }}
          protocol: TCP
        {{- end }}
      # Up before the service is: from then on somebody answers for it.
      startupProbe:
        httpGet: {path: /health, port: admin}
        periodSeconds: 2
        failureThreshold: {{ div (add $part.startupSeconds 1) 2 }}
      # Ready: it takes requests. Not so while it starts, drains, or (a worker) its engine is stuck, or (a router) no decode worker
      # is known.
      readinessProbe:
        httpGet: {path: /ready, port: admin}
        periodSeconds: 2
        timeoutSeconds: 2
        failureThreshold: 2
      # Answered by a thread of its own, however busy the service is: no answer is a dead process.
      livenessProbe:
        httpGet: {path: /health, port: admin}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 6
      {{- if $part.preStopSeconds }}
      lifecycle:
        preStop:
          sleep:
            seconds: {{ $part.preStopSeconds }}
      {{- end }}
      {{- with $resources }}
      resources:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      securityContext:
        {{- toYaml $security | nindent 8 }}
      volumeMounts:
        - name: config
          mountPath: /etc/kvasir/config
          readOnly: true
        - name: tmp
          mountPath: /tmp
        {{- if $root.Values.etcd.tls.secret }}
        - name: tls-etcd
          mountPath: /etc/kvasir/etcd
          readOnly: true
        {{- end }}
        {{- if $root.Values.etcd.auth.username }}
        - name: etcd-user
          mountPath: /etc/kvasir/etcd-user
          readOnly: true
        {{- end }}
        {{- if $root.Values.operator.tokensSecret.name }}
        - name: operators
          mountPath: /etc/kvasir/operators
          readOnly: true
        {{- end }}
        {{- if $root.Values.tls.rpc.secret }}
        - name: tls-rpc
          mountPath: /etc/kvasir/rpc
          readOnly: true
        {{- end }}
        {{- if and .transfers $root.Values.tls.transfer.secret }}
        - name: tls-transfer
          mountPath: /etc/kvasir/transfer
          readOnly: true
        {{- end }}
        {{- range .models }}
        {{- with include "kvasir.model.mounts" . }}
        {{- . | nindent 8 }}
        {{- end }}
        {{- end }}
        {{- with ($part.shm).sizeLimit }}
        - name: shm
          mountPath: /dev/shm
        {{- end }}
        {{- with .mounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
        {{- with $part.volumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: config
      configMap:
        name: {{ .config }}
    - name: tmp
      emptyDir: {}
    {{- with $root.Values.etcd.tls.secret }}
    - name: tls-etcd
      secret:
        secretName: {{ . }}
        defaultMode: 0440
    {{- end }}
    {{- if $root.Values.etcd.auth.username }}
    - name: etcd-user
      secret:
        secretName: {{ $root.Values.etcd.auth.passwordSecret.name }}
        defaultMode: 0440
    {{- end }}
    {{- with $root.Values.operator.tokensSecret.name }}
    - name: operators
      secret:
        secretName: {{ . }}
        defaultMode: 0440
    {{- end }}
    {{- with $root.Values.tls.rpc.secret }}
    - name: tls-rpc
      secret:
        secretName: {{ . }}
        defaultMode: 0440
    {{- end }}
    {{- if and .transfers $root.Values.tls.transfer.secret }}
    - name: tls-transfer
      secret:
        secretName: {{ $root.Values.tls.transfer.secret }}
        defaultMode: 0440
    {{- end }}
    {{- range .models }}
    {{- with include "kvasir.model.volumes" . }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- end }}
    {{- with ($part.shm).sizeLimit }}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ . }}
    {{- end }}
    {{- with .volumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- with $part.volumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}
