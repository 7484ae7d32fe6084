//! What a front's successor makes of what it finds.

use super::*;

const SUBMIT: Offer<'_> = Offer { kind: Kind::Submit, subscription: b"mine", ..CALL };

impl Rig {
    /// The front dies and is replaced: what its successor adopted.
    fn take_over(&mut self) -> Vec<Adopted> {
        let view = view(&self.owner, Slot::Front(0));
        let (front, adopted) = Front::attach(view, self.topology.clone(), self.bells.clone(), 0);
        self.front = front;
        adopted
    }

    /// Takes an item and does it, if its payload is this.
    fn work_on(&mut self, payload: &[u8]) -> bool {
        let worker = &mut self.workers[0];
        let claimed = worker.take().unwrap();
        let (item, mut reply) = worker.open(&claimed, 0).unwrap();
        let is_right = item.payload() == payload;
        reply.complete(claimed, 0, 0, 0);
        is_right
    }
}

#[test]
fn nothing_that_was_submitted_is_written_over() {
    let mut rig = rig("written-over");
    let metadata = [b'm'; 100];
    let left = |items: u64| BYTES - items * 1024 - items * 128;
    let first = rig.offer(Offer { metadata: &metadata, ..SUBMIT }, &[1; 1000]).unwrap();
    let adopted = rig.take_over();
    assert_eq!(adopted.iter().map(|one| one.index).collect::<Vec<_>>(), [first]);
    assert_eq!(rig.front.free_request_bytes(), left(1));
    rig.offer(Offer { metadata: &metadata, ..SUBMIT }, &[2; 1000]).unwrap();
    assert_eq!(rig.front.free_request_bytes(), left(2));
    rig.front.ring();
    assert!(rig.work_on(&[1; 1000]) && rig.work_on(&[2; 1000]));
    // Each item may still have two parts of the memory.
    let others = ITEMS as usize - 2;
    (0..others).for_each(|_| _ = rig.offer(Offer { metadata: &metadata, ..CALL }, &[3; 1000]).unwrap());
    assert!((0..others).all(|_| rig.work_on(&[3; 1000])));
    // Of what is done nobody needs the payload any more, whoever finds it.
    assert_eq!(rig.take_over().len(), 2);
    assert_eq!(rig.front.free_request_bytes(), BYTES - 2 * 128);
    assert_eq!(rig.collect(), [1, 1]);
    assert_eq!((rig.front.free_request_bytes(), rig.front.free_items()), (BYTES, ITEMS as usize));
}

#[test]
fn calls_end_with_their_front_and_submitted_items_do_not() {
    let mut rig = rig("calls");
    for offer in [CALL, SUBMIT] {
        rig.offer(offer, &[3; 100]).unwrap();
    }
    let [call, submitted] = [0, 1].map(|worker: usize| rig.workers[worker].take().unwrap());
    for offer in [CALL, SUBMIT] {
        rig.offer(offer, &[3; 100]).unwrap();
    }
    let adopted = rig.take_over();
    assert!(adopted.len() == 2 && adopted.iter().all(|one| one.subscription == b"mine"));
    assert_eq!((call.is_cancelled(), submitted.is_cancelled()), (true, false));
    rig.front.ring();
    assert!(rig.work_on(&[3; 100]));
    assert!(rig.workers[0].take().is_none(), "nobody waits for the other");
    for claimed in [call, submitted] {
        rig.workers[2].reply(&claimed, 0).complete(claimed, 0, 0, 0);
    }
    assert_eq!(rig.collect().len(), 2);
    assert_eq!((rig.front.free_request_bytes(), rig.front.free_items()), (BYTES, ITEMS as usize));
}

#[test]
fn deadlines_and_those_that_they_ended_are_a_successors_too() {
    let mut rig = rig("deadlines");
    let expired = rig.offer(Offer { deadline: 7, ..SUBMIT }, &[3; 100]).unwrap();
    let waiting = rig.offer(Offer { id: 2, deadline: 8, ..SUBMIT }, &[3; 100]).unwrap();
    assert!(rig.front.expire(expired));
    for front in 0..2 {
        let mut adopted: Vec<_> = rig.take_over().iter().map(|one| (one.index, one.deadline)).collect();
        adopted.sort_unstable();
        let mut wanted = [(expired, 7), (waiting, 8)];
        wanted.sort_unstable();
        assert_eq!(adopted, wanted, "{front}");
        rig.front.ring();
    }
    // The look through all items finds both.
    let mut ended: Vec<_> = std::iter::from_fn(|| rig.front.collect()).collect();
    ended.sort_unstable_by_key(|done| done.id);
    assert_eq!(
        ended.iter().map(|done| (done.id, done.outcome)).collect::<Vec<_>>(),
        [1, 2].map(|id| (id, Outcome::Expired))
    );
    ended.iter().for_each(|done| rig.front.release(done.index));
    assert!(rig.workers[0].take().is_none() && rig.front.collect().is_none());
    assert_eq!((rig.front.free_request_bytes(), rig.front.free_items()), (BYTES, ITEMS as usize));
}

#[test]
fn what_can_never_end_is_found_damaged() {
    let mut rig = rig("never");
    for damage in [
        |word: Word| Word::new(word.generation(), 200, 0, Phase::Claimed, 0),
        |word: Word| word.with(Phase::Claimed, 4),
    ] {
        let index = rig.offer(SUBMIT, b"").unwrap();
        let word = rig.word(index);
        damage(word).store(&rig.supervisor.item(index).word, word);
        assert_eq!(rig.take_over().len(), 1);
        let done = rig.front.collect().unwrap();
        assert_eq!((done.index, done.outcome), (index, Outcome::Damaged));
        rig.front.release(index);
        // Its hint leads to nothing.
        assert!(rig.workers[0].take().is_none());
    }
}

#[test]
fn words_of_one_record_are_no_other_records() {
    let mut rig = rig("spread");
    let offered = |rig: &Rig, index| rig.word(index).offered(1);
    for one in 0..ITEMS {
        for other in (0..ITEMS).filter(|&other| other != one) {
            assert!(!offered(&rig, one).follows(offered(&rig, other), 4), "{one} {other}");
        }
    }
    // And of a record that was used none is used again.
    let index = rig.call(1);
    rig.front.cancel(index);
    let before = rig.word(index);
    rig.take_over();
    assert_eq!(rig.word(index), before);
}
