package transport

// Bits of the ISR status, 4.1.4.5.
const (
	isrQueue  = 1
	isrConfig = 2
)

// pump passes the driver's notifications, which the kernel counts in an eventfd,
// to the queue. It ends when the eventfd is closed.
func (q *queue) pump() {
	for q.kick.wait() {
		q.Signal()
	}
}

// queueInterrupt tells the driver that a queue has used elements.
func (t *Transport) queueInterrupt(q *queue) {
	t.isr.Or(isrQueue)
	t.msix.Raise(int(q.vector.Load()))
}

// configInterrupt tells the driver that the configuration or the status has
// changed.
func (t *Transport) configInterrupt() {
	t.isr.Or(isrConfig)
	t.msix.Raise(int(t.configVector.Load()))
}

// moved moves the ioeventfds with the registers.
func (t *Transport) moved(base uint64, there bool) {
	t.places.Lock()
	defer t.places.Unlock()
	t.base = 0
	if there {
		t.base = base
	}
	for i := range t.queues {
		t.place(i)
	}
}

// wantNotifications says whether the queue has an ioeventfd. The kernel has room
// for 1000 of them and of other devices (NR_IOBUS_DEVS), so only queues in use
// have one.
func (t *Transport) wantNotifications(q *queue, on bool) {
	t.places.Lock()
	defer t.places.Unlock()
	q.enabled = on
	for i := range t.queues {
		if t.queues[i] == q {
			t.place(i)
		}
	}
}

// place puts the queue's ioeventfd at the queue's notification address. Without
// one the guest's writes arrive at the registers, which is slower.
func (t *Transport) place(i int) {
	q, at := t.queues[i], uint64(0)
	if q.enabled && t.base != 0 {
		at = t.base + notifyAt + uint64(i)*notifyStep
	}
	if at == q.at {
		return
	}
	if q.at != 0 {
		if err := t.host.Notifications.DeassignIOEventFD(q.at, q.kick.fd); err != nil {
			t.host.Log.Warn("remove an ioeventfd", "queue", i, "err", err)
		}
		q.at = 0
	}
	if at == 0 {
		return
	}
	if err := t.host.Notifications.AssignIOEventFD(at, q.kick.fd); err != nil {
		t.host.Log.Warn("no ioeventfd, notifications cost an exit", "queue", i, "err", err)
		return
	}
	q.at = at
}
