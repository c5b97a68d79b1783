#!/bin/sh
# Makes the stubs, dash_api/, from the .proto files. Needs go, and protoc or a Python with grpcio-tools ($PYTHON).
set -eu
cd "$(dirname "$0")"

# The plugins, in the versions that go.mod pins.
go build -o bin/ google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc

if command -v protoc >/dev/null; then
  protoc=protoc
else
  protoc="${PYTHON:-python3} -m grpc_tools.protoc"
fi

# The .proto files name no Go package; these options do.
set -- --go_opt=module=dashexample --go-grpc_opt=module=dashexample
for file in common generation model; do
  package="Mdash_api/v1/$file.proto=dashexample/dash_api/v1;dashv1"
  set -- "$@" "--go_opt=$package" "--go-grpc_opt=$package"
done
$protoc -I ../../proto \
  --plugin=protoc-gen-go=bin/protoc-gen-go --plugin=protoc-gen-go-grpc=bin/protoc-gen-go-grpc \
  --go_out=. --go-grpc_out=. "$@" \
  dash_api/v1/common.proto dash_api/v1/generation.proto dash_api/v1/model.proto
