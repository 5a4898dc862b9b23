package migrate

import "time"

// In time-outs, of 10 s: how long a state may be loaded while nothing comes of the memory that
// loading waits for, and how long in all. A source that means it answers in a round trip, and
// undoes a stop that takes long; one that does not must not hold the receiver's place.
const (
	loadQuiet = 3
	loadMost  = 60
)

// whileLoading gives up what is missing when it does not come any more while the state is
// loaded, which waits for some of it: the source undoes its stop, or is lost, or answers
// nothing, of which stuck tells.
func (s *session) whileLoading(in *intake, loaded <-chan struct{}) (undo header, stuck error) {
	m := in.armed()
	t := time.NewTicker(in.timeout)
	defer t.Stop()
	for all, quiet, left := 0, 0, m.Left(); ; {
		select {
		case r := <-s.undos:
			_ = in.disarm()
			return r.header, nil
		case <-s.ctx.Done():
			_ = in.disarm()
			return undo, nil
		case <-loaded:
			return undo, nil
		case <-t.C:
			all, quiet = all+1, quiet+1
			if now := m.Left(); now != left {
				quiet, left = 0, now
			}
			if quiet < loadQuiet && all < loadMost {
				continue
			}
			_ = in.disarm()
			return undo, openly("the machine's state is not loaded after %v: it waits for memory that comes later, of which nothing has come for %v",
				time.Duration(all)*in.timeout, time.Duration(quiet)*in.timeout)
		}
	}
}
