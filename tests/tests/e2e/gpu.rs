//! Workers that compute on a GPU beside workers that compute on a processor. The GPU is an emulated one, which takes seconds
//! for what a real one does in milliseconds: few questions.

use std::{fs::File, net::Ipv4Addr, path::Path, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use kvasir_tests::{Cluster, Service, golden::KvDtype, net::Place, workspace};

use crate::golden::some_agree;

#[tokio::test]
async fn a_gpu_reads_prompts_for_processors_that_answer() -> Result<()> {
    with_gpu(Service::Prefill).await
}

#[tokio::test]
async fn a_processor_reads_prompts_for_gpus_that_answer() -> Result<()> {
    with_gpu(Service::Decode).await
}

/// Workers of one kind compute on an emulated device, the others do not; answers are the reference's, and blocks moved.
async fn with_gpu(service: Service) -> Result<()> {
    let folder = workspace::demo_model();
    let enter = vec!["env".to_owned(), format!("LD_LIBRARY_PATH={}", driver()?)];
    let place = Place { address: Ipv4Addr::LOCALHOST.into(), enter };
    Cluster::builder()
        .model(&folder)
        .kv_store(0)
        .worker("engine.max_batch_tokens", 128)
        .worker("engine.chunk_tokens", 64)
        .set(Service::Decode, "decode.local_prefill_tokens", 0)
        .set(service, "engine.device", "cuda:0")
        .place(service, 0, place)
        .run(async |cluster| {
            some_agree(cluster, &folder, 2, KvDtype::default()).await?;
            let log = cluster.node(service, 0).process.log();
            ensure!(log.contains("cuda backend ready"), "{log}");
            let peers = cluster.node(Service::Prefill, 0).status().await?.peers;
            let written = peers.iter().map(|peer| peer.written_bytes).sum::<u64>();
            ensure!(written > 0, "blocks go from one to the other: {peers:?}");
            Ok(())
        })
        .await
}

/// A device is lost in the middle of an answer: its worker ends, and answers go on elsewhere as if nothing had been.
#[tokio::test]
async fn requests_of_a_gpu_that_is_lost_go_on_elsewhere() -> Result<()> {
    let folder = workspace::demo_model();
    let driver = format!("LD_LIBRARY_PATH={}", driver()?);
    let on = |faults: &[&str]| {
        let enter = ["env", driver.as_str()].iter().chain(faults).map(|word| (*word).to_owned()).collect();
        Place { address: Ipv4Addr::LOCALHOST.into(), enter }
    };
    Cluster::builder()
        .model(&folder)
        .kv_store(0)
        .decode(2)
        .worker("engine.max_batch_tokens", 128)
        .worker("engine.chunk_tokens", 64)
        .set(Service::Decode, "engine.device", "cuda:0")
        .set(Service::Decode, "decode.local_prefill_tokens", 0)
        // Enough to start and to write some tokens.
        .place(Service::Decode, 0, on(&["EMULATED_CUDA_FAIL_AFTER=300"]))
        .place(Service::Decode, 1, on(&[]))
        .run(async |cluster| {
            for warning in
                ["an answer broke off", "request failed", "emulated device: launch", "the device that the model"]
            {
                cluster.expect_warning(warning);
            }
            for _ in 0..4 {
                let asked: &Cluster = cluster;
                let ask = || some_agree(asked, &folder, 1, KvDtype::default());
                let (one, other) = tokio::join!(ask(), ask());
                one.and(other)?;
                if cluster.node_mut(Service::Decode, 0).process.ended().is_some() {
                    break;
                }
            }
            let process = &mut cluster.node_mut(Service::Decode, 0).process;
            let status = process.wait(Duration::from_secs(30)).await?;
            ensure!(status.code() == Some(1), "{status}: {}", process.log());
            ensure!(process.log().contains("the device that the model is computed on failed"), "{}", process.log());
            Ok(())
        })
        .await
}

/// The folder of the emulated device's driver, built if nobody has.
fn driver() -> Result<String> {
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulated-cuda");
    std::fs::create_dir_all(&out)?;
    let lock = File::create(out.join("lock"))?;
    lock.lock()?;
    let build = workspace::root().join("crates/model/kernels/emulator/build");
    let built = Command::new(build).arg(&out).output().context("kernels' build for this machine")?;
    ensure!(built.status.success(), "kernels are not built: {}", String::from_utf8_lossy(&built.stderr));
    Ok(out.to_string_lossy().into_owned())
}
