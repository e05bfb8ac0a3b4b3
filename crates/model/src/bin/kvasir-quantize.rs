//! `kvasir-quantize IN OUT --to int8|fp8|fp8-block`: a model folder with 8-bit weights, made of one without.

use std::{path::Path, process::ExitCode};

use kvasir_model::quantize::{Scheme, quantize};

const USAGE: &str = "usage: kvasir-quantize IN OUT --to int8|fp8|fp8-block\n\n\
    Writes to OUT the model folder IN with the linear maps of its layers rounded to 8 bits, row by row\n\
    (compressed-tensors, weights only) or, with fp8-block, by blocks of 128 x 128 weights that share a\n\
    scale (as DeepSeek-V3's own files); everything else is copied.";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let (from, to, scheme) = match args[..] {
        ["-h" | "--help"] => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        [from, to, "--to", scheme] | ["--to", scheme, from, to] => (from, to, scheme),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    let Some(scheme) = Scheme::parse(scheme) else {
        eprintln!("--to {scheme}: int8, fp8 or fp8-block");
        return ExitCode::from(2);
    };
    match quantize(Path::new(from), Path::new(to), scheme) {
        Ok(report) => {
            println!(
                "{} matrices rounded, {} tensors kept; {:.1} MB, before {:.1} MB; relative error of weights {:.4}",
                report.rounded,
                report.kept,
                report.bytes_after as f64 / 1e6,
                report.bytes_before as f64 / 1e6,
                report.relative_error
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            let mut chain: &dyn std::error::Error = &error;
            eprint!("{chain}");
            while let Some(source) = chain.source() {
                eprint!(": {source}");
                chain = source;
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}
