//! The few names of vLLM's that gateways (the Gateway API's inference extension) and autoscalers read from any engine.

use kvasir_cluster::ModelInfo;
use kvasir_engine::Handle;
use kvasir_runtime::metrics::{Family, FloatGauge, Gauge};

type ByModel = [(&'static str, String); 1];

/// Shows them, of a worker that serves that model.
pub(super) fn register(page: &kvasir_runtime::Metrics, engine: Handle, model: &ModelInfo, blocks: usize) {
    let block_size = model.layout.block_size;
    let model = [("model_name", model.name.clone())];
    let gauge = |name: &str, help: &str| -> Gauge { page.gauges::<ByModel>(name, help).get_or_create(&model).clone() };
    let running = gauge("vllm:num_requests_running", "As kvasir_worker_sequences of state running, for gateways");
    let waiting = gauge("vllm:num_requests_waiting", "As kvasir_worker_sequences of state waiting, for gateways");
    let used: Family<ByModel, FloatGauge> =
        page.float_gauges("vllm:kv_cache_usage_perc", "KV blocks in use of all blocks, 0 to 1, for gateways");
    let used = used.get_or_create(&model).clone();
    let config: Family<[(&'static str, String); 2], Gauge> = page
        .gauges("vllm:cache_config_info", "Always 1: tokens of a KV block and how many blocks there are, for gateways");
    config.get_or_create(&[("block_size", block_size.to_string()), ("num_gpu_blocks", blocks.to_string())]).set(1);
    page.on_scrape(move || {
        let stats = engine.stats();
        running.set(stats.running as i64);
        waiting.set(stats.waiting as i64);
        used.set(stats.blocks.in_use as f64 / blocks.max(1) as f64);
    });
}
