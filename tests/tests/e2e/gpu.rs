//! Workers that compute on GPUs beside workers that compute on a processor, by one or by two ranks. GPUs are emulated ones, which
//! take seconds for what real ones do in milliseconds: few questions.

use std::{fs::File, net::Ipv4Addr, path::Path, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use kvasir_tests::{Cluster, Service, golden::KvDtype, net::Place, workspace};

use crate::golden::some_agree;

#[tokio::test]
async fn two_gpus_read_prompts_for_processors_that_answer() -> Result<()> {
    with_gpus(Service::Prefill, 2, 1).await
}

#[tokio::test]
async fn a_processor_in_two_parts_reads_prompts_for_gpus_that_answer() -> Result<()> {
    with_gpus(Service::Decode, 1, 2).await
}

/// Workers of one kind compute on so many emulated devices each, the others on so many parts of the processor; answers are the
/// reference's, and blocks moved.
async fn with_gpus(service: Service, gpus: usize, parts: usize) -> Result<()> {
    let folder = workspace::demo_model();
    let enter =
        vec!["env".to_owned(), format!("LD_LIBRARY_PATH={}", driver()?), format!("EMULATED_CUDA_DEVICES={gpus}")];
    let other = if service == Service::Prefill { Service::Decode } else { Service::Prefill };
    let place = Place { address: Ipv4Addr::LOCALHOST.into(), enter };
    Cluster::builder()
        .model(&folder)
        .kv_store(0)
        .worker("engine.max_batch_tokens", 128)
        .worker("engine.chunk_tokens", 64)
        .set(Service::Decode, "decode.local_prefill_tokens", 0)
        .set(service, "engine.device", "cuda:0")
        .set(service, "engine.tensor_parallel", gpus)
        .set(other, "engine.tensor_parallel", parts)
        .place(service, 0, place)
        .run(async |cluster| {
            some_agree(cluster, &folder, 2, KvDtype::default()).await?;
            let log = cluster.node(service, 0).process.log();
            ensure!(log.matches("cuda backend ready").count() == gpus, "{log}");
            ensure!(log.contains("devices are connected by nccl") == (gpus > 1), "{log}");
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
