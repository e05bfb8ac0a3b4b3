//! A collector of spans: takes what services send by OpenTelemetry's protocol (OTLP over gRPC), and keeps it.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::Result;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::any_value::Value,
};
use tokio::{net::TcpListener, task::JoinSet};
use tonic::{Request, Response, Status};

/// A span, as far as tests look at it.
#[derive(Clone, Debug)]
pub struct Span {
    /// `service.name` of the process that sent it.
    pub service: String,
    /// What it is.
    pub name: String,
    /// Whose way it is a part of, in hexadecimal.
    pub trace: String,
    /// Its own id, in hexadecimal.
    pub id: String,
    /// The span that it is a part of; empty: none.
    pub parent: String,
    /// Nanoseconds since 1970.
    pub began: u64,
    /// The same.
    pub ended: u64,
    /// `request_id`, if it has one.
    pub request: Option<String>,
}

/// A running collector; dropping it ends it.
pub struct Collector {
    address: SocketAddr,
    spans: Kept,
    // Ended with it.
    _serving: JoinSet<()>,
}

#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<Span>>>);

impl Collector {
    /// Starts one.
    ///
    /// # Errors
    /// There is no port.
    pub async fn start() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let (address, spans) = (listener.local_addr()?, Kept::default());
        let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(spans.clone()));
        let serving = async move {
            let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
            let _ended = server.serve_with_incoming(incoming).await;
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(serving);
        Ok(Self { address, spans, _serving: tasks })
    }

    /// What `trace.otlp` is to be.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// All spans of a trace so far.
    pub fn trace(&self, trace: &str) -> Vec<Span> {
        self.all().into_iter().filter(|span| span.trace == trace).collect()
    }

    /// All spans so far.
    pub fn all(&self) -> Vec<Span> {
        self.spans.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[tonic::async_trait]
impl TraceService for Kept {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let text = |value: Option<&Value>| match value {
            Some(Value::StringValue(text)) => Some(text.clone()),
            _ => None,
        };
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for of_process in request.into_inner().resource_spans {
            let attributes = of_process.resource.map(|resource| resource.attributes).unwrap_or_default();
            let service = attributes.iter().find(|attribute| attribute.key == "service.name");
            let service = text(service.and_then(|name| name.value.as_ref()?.value.as_ref())).unwrap_or_default();
            for span in of_process.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                let request = span.attributes.iter().find(|attribute| attribute.key == "request_id");
                kept.push(Span {
                    service: service.clone(),
                    name: span.name,
                    trace: hexadecimal(&span.trace_id),
                    id: hexadecimal(&span.span_id),
                    parent: hexadecimal(&span.parent_span_id),
                    began: span.start_time_unix_nano,
                    ended: span.end_time_unix_nano,
                    request: text(request.and_then(|id| id.value.as_ref()?.value.as_ref())),
                });
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
