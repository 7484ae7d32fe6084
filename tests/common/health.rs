//! `grpc.health.v1` as its clients see it.

use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use super::{Server, soon};

/// See the module.
#[derive(Clone, Debug)]
pub struct Health(HealthClient<Channel>);

impl Health {
    pub async fn of(server: &Server) -> Self {
        let endpoint = Endpoint::from_shared(format!("http://{}", server.addr)).expect("an address");
        Health(HealthClient::new(soon("a connection", endpoint.connect()).await.expect("a connection")))
    }

    /// Whether a service serves now.
    pub async fn serves(&self, service: &str) -> bool {
        let request = HealthCheckRequest { service: service.to_owned() };
        let answer = soon("an answer", self.0.clone().check(request)).await.expect("a status");
        answer.into_inner().status() == ServingStatus::Serving
    }

    /// Waits until it does, or does not.
    pub async fn until(&self, service: &str, serves: bool) {
        let request = HealthCheckRequest { service: service.to_owned() };
        let mut watch = self.0.clone().watch(request).await.expect("a stream").into_inner();
        loop {
            let told = soon("a change", watch.message()).await.expect("an open stream").expect("a status");
            if (told.status() == ServingStatus::Serving) == serves {
                return;
            }
        }
    }
}
