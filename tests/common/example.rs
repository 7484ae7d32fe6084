// What the examples in the documentation have around them and do not show. Each includes this file.

#[allow(dead_code)] // Each uses its own part of it.
mod example {
    use std::{
        error::Error,
        fmt::Debug,
        net::{Ipv4Addr, SocketAddr},
        panic::{self, AssertUnwindSafe},
        sync::OnceLock,
        time::{Duration, Instant},
    };

    use forkring::{
        Client, Server, ServerError,
        config::{ByteSize, Config},
        process,
    };
    use rustix::process::Signal;
    use socket2::{Domain, Socket, Type};

    const PATIENCE: Duration = Duration::from_secs(30);

    /// Where its server listens: a port that nobody else has, as it is bound here, too, and only the server listens.
    pub fn here() -> SocketAddr {
        static HERE: OnceLock<(Socket, SocketAddr)> = OnceLock::new();
        let bind = || {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
            socket.set_reuse_address(true).expect("a socket");
            socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).expect("a port");
            let address = socket.local_addr().expect("a port").as_socket().expect("an address");
            (socket, address)
        };
        HERE.get_or_init(bind).1
    }

    /// Settings by which its server is in nobody's way.
    pub fn settings(config: &mut Config) {
        config.listen = here().into();
        config.name = format!("example-{}", std::process::id());
        (config.arena, config.max_message) = (Some(ByteSize::mib(1)), Some(ByteSize::new(512 << 10)));
    }

    /// A server with the pool `sha256`.
    pub fn hashes() -> Result<(), ServerError> {
        let mut config = Config { pools: vec!["sha256:1=sha256".parse().expect("a pool")], ..Config::default() };
        settings(&mut config);
        Server::from_config(config)?.run()
    }

    /// Serves in a child, which is drained when it has been asked what is to be asked.
    pub fn run<E: Debug>(
        serve: impl FnOnce() -> Result<(), E>,
        ask: impl AsyncFnOnce(Client) -> Result<(), Box<dyn Error>>,
    ) {
        here();
        let serve = || serve().map_or_else(|error| panic!("{error:?}"), |()| 0);
        let server = process::fork("example", serve).expect("a child");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let ask = async {
            let begin = Instant::now();
            let client = loop {
                match Client::connect(&here().to_string()).await {
                    Ok(client) => break client,
                    Err(error) => assert!(begin.elapsed() < PATIENCE, "{error}"),
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            };
            tokio::time::timeout(PATIENCE, ask(client)).await.expect("it comes to an end").expect("an answer");
        };
        // It is drained in any case, and leaves nothing.
        let asked = panic::catch_unwind(AssertUnwindSafe(|| runtime.block_on(ask)));
        server.signal(Signal::TERM).expect("a child");
        let status = server.reap().expect("a child");
        asked.unwrap_or_else(|reason| panic::resume_unwind(reason));
        assert!(status.success(), "{status}");
    }
}
