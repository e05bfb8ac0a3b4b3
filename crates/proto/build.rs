//! Generates the gRPC code from `proto/kvasir/v1`. Needs `protoc` (Debian: protobuf-compiler), as etcd-client does.
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = "../../proto";
    let files = ["common", "worker", "store", "paths"].map(|name| format!("{root}/kvasir/v1/{name}.proto"));
    for file in &files {
        println!("cargo::rerun-if-changed={file}");
    }
    tonic_prost_build::configure().bytes(".").compile_protos(&files, &[root.to_owned()])?;
    Ok(())
}
