#!/bin/sh
# docker/compose.sh up: builds and starts what docker/compose.yaml names, waits until all of it is
#   healthy, and writes a client's configuration for this host to .dev/compose/ (make doctor).
# docker/compose.sh down: ends it, and removes containers, network, keys and that configuration.
set -eu
cd "$(dirname "$0")/.."
host_files=.dev/compose
healthy_deadline_s=30

if docker compose version >/dev/null 2>&1; then
  compose() { docker compose -f docker/compose.yaml "$@"; }
elif command -v docker-compose >/dev/null; then
  compose() { docker-compose -f docker/compose.yaml "$@"; }
else
  echo "compose.sh: there is no Docker Compose here; install docker-compose-plugin" \
    "(Debian: docker-compose)" >&2
  exit 1
fi

health() { docker inspect --format '{{.State.Health.Status}}' "$(compose ps -q "$1")"; }

wait_until_healthy() {
  end=$(($(date +%s) + healthy_deadline_s))
  for service in udp-echo gateway client; do
    until [ "$(health "$service")" = healthy ]; do
      if [ "$(date +%s)" -ge "$end" ]; then
        echo "compose.sh: $service is not healthy after $healthy_deadline_s s" >&2
        compose ps >&2
        compose logs --tail 20 "$service" >&2
        exit 1
      fi
      sleep 0.5
    done
  done
}

write_host_files() {
  address=$(compose port --protocol udp gateway 4433)
  mkdir -p "$host_files"
  umask 077
  compose exec -T gateway cat /etc/toppy/ca.pem > "$host_files/ca.pem"
  compose exec -T gateway cat /etc/toppy/client.toml | sed \
    -e "s/^gateway = .*/gateway = \"${address%:*}\"/" -e "s/^port = .*/port = ${address##*:}/" \
    -e 's/^server_name = .*/server_name = "localhost"/' \
    -e 's/^ca_cert_path = .*/ca_cert_path = "ca.pem"/' > "$host_files/client.toml"
}

case ${1-} in
  up)
    compose build gateway # every service has this image
    compose up --detach
    wait_until_healthy
    write_host_files
    echo "healthy; curl http://127.0.0.1:8080/healthz, UDP echo through the gateway at" \
      "127.0.0.1:19000, this host's client.toml in $host_files (make doctor)"
    ;;
  down)
    rm -rf "$host_files"
    compose down --volumes --remove-orphans
    ;;
  *)
    echo "usage: docker/compose.sh up|down" >&2
    exit 2
    ;;
esac
