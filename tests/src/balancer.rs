//! A stand-in for what is before routers, a Kubernetes Service say: a new connection goes to one of those in a list, and stays
//! there, whatever becomes of the list.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::Result;
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

/// Passes connections on until it is dropped.
pub struct Balancer {
    address: SocketAddr,
    /// Written by the test, read for each connection.
    targets: Arc<Mutex<Vec<String>>>,
    _tasks: JoinSet<()>,
}

impl Balancer {
    /// To these `host:port`, in turn.
    pub async fn start(targets: Vec<String>) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let targets = Arc::new(Mutex::new(targets));
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, Arc::clone(&targets)));
        Ok(Self { address, targets, _tasks: tasks })
    }

    /// `host:port` for clients.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// From now on, new connections go to these.
    pub fn set(&self, targets: Vec<String>) {
        *self.targets.lock().unwrap_or_else(PoisonError::into_inner) = targets;
    }
}

async fn accept(listener: TcpListener, targets: Arc<Mutex<Vec<String>>>) {
    let mut connections = JoinSet::new();
    for turn in 0usize.. {
        let Ok((client, _)) = listener.accept().await else { return };
        let target = {
            let targets = targets.lock().unwrap_or_else(PoisonError::into_inner);
            targets.get(turn % targets.len().max(1)).cloned().unwrap_or_default()
        };
        connections.spawn(pass(client, target));
        while connections.try_join_next().is_some() {}
    }
}

/// Whatever ends it on one side ends it on the other; a refused connection is closed, which the client sees as an error.
async fn pass(mut client: TcpStream, target: String) {
    let Ok(mut server) = TcpStream::connect(target).await else { return };
    let nodelay = client.set_nodelay(true).and_then(|()| server.set_nodelay(true));
    if nodelay.is_ok() {
        let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
    }
}
