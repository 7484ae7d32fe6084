//! `Submit`: many items in, one receipt out.
//!
//! When the outbox or the item table is full, the stream is not read on until there is room. The RPC's deadline ends it like
//! any break: it is not that of its items.

use std::{future::poll_fn, pin::pin, rc::Rc, task::Poll};

use bytes::BytesMut;

use super::{
    connection::Exchange,
    hub::{Hub, NotOffered, until},
    input::Input,
    request_body::RequestBody,
    status::Refusal,
    unary::UnaryBody,
    wire::encode_message,
};
use crate::crash_point::crash_point;
use crate::proto::v1::{Rejection, Status as ItemStatus, SubmitReceipt};

/// Refusals that the receipt tells of.
const REJECTIONS: usize = 32;
/// Items that are read before others get their turn.
const BURST: usize = 256;

/// Accepts items up to the end of the stream. If it breaks off, what was accepted stays accepted.
pub async fn submit(hub: Rc<Hub>, body: RequestBody, deadline: u64, exchange: &Exchange) -> Result<UnaryBody, Refusal> {
    let mut input = Input::new(hub.clone(), body, true);
    let mut receipt = SubmitReceipt::default();
    let mut drain = hub.draining.subscribe();
    let mut over = pin!(until(deadline));
    loop {
        let burst = poll_fn(|cx| {
            for _ in 0..BURST {
                match input.poll_item(cx) {
                    Poll::Ready(Ok(true)) => {}
                    Poll::Ready(end) => return Poll::Ready(end.map(|_| true)),
                    Poll::Pending => return Poll::Pending,
                }
                exchange.begin_work();
                let (head, request) = input.item();
                match hub.offer_submitted(head, request) {
                    Ok(()) => receipt.accepted += 1,
                    // Not the item's own fault: the stream ends here, like those that find out below.
                    Err(NotOffered::Never(_)) if hub.is_draining() => return Poll::Ready(Err(Refusal::draining())),
                    Err(NotOffered::Never(refusal)) => reject(&mut receipt, head.id, refusal),
                    Err(NotOffered::Later(_)) => {
                        hub.wait_for_room(cx.waker());
                        return Poll::Pending;
                    }
                }
                input.next();
            }
            Poll::Ready(Ok(false))
        });
        let burst = tokio::select! {
            biased;
            // First: a client that never pauses has a next burst each time.
            () = &mut over => Err(Refusal::late()),
            burst = burst => burst,
            // Also if it had begun before.
            _ = drain.wait_for(|draining| *draining) => Err(Refusal::draining()),
        };
        match burst {
            Ok(true) => break,
            Ok(false) => tokio::task::yield_now().await,
            Err(mut refusal) => {
                input.close();
                if receipt.accepted > 0 {
                    refusal.message += &format!(" (items accepted before: {})", receipt.accepted);
                }
                return Err(refusal);
            }
        }
    }
    crash_point!("submit.accepted");
    let mut message = BytesMut::new();
    encode_message(&mut message, &receipt);
    Ok(UnaryBody::new(message.freeze()))
}

fn reject(receipt: &mut SubmitReceipt, id: u64, refusal: Refusal) {
    receipt.rejected += 1;
    if receipt.rejections.len() < REJECTIONS {
        let status = ItemStatus {
            code: refusal.code as i32,
            message: refusal.message,
            reason: refusal.reason.into_owned(),
            traceback: refusal.traceback,
        };
        receipt.rejections.push(Rejection { id, status: Some(status) });
    }
}
