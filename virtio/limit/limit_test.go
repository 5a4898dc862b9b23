package limit

import (
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// However many users ask however often, a time gives no more than rate and burst, and
// one request more; nor less, if there is always a request.
func TestRate(t *testing.T) {
	const minute, request = time.Minute, 3 << 20 // of bytes: larger than some bursts
	for _, c := range []struct {
		r    Rates
		ops  bool
		most uint64 // in a minute
	}{
		{Rates{IOPS: 1}, true, 1 + 60},
		{Rates{IOPS: 300}, true, 30 + 300*60},
		{Rates{IOPS: 10, IOPSBurst: 100}, true, 100 + 10*60},
		{Rates{BPS: 1 << 20}, false, 1<<20/10 + 60<<20},
		{Rates{BPS: 1000, BPSBurst: MinBurst}, false, MinBurst + 60*1000},
		{Rates{BPS: 100 << 20, BPSBurst: 1 << 30}, false, 1<<30 + 6000<<20},
		{Rates{BPS: 10 << 20, IOPS: 1}, true, 1 + 60}, // the tighter one counts
	} {
		synctest.Test(t, func(t *testing.T) {
			l := c.r.Limiter()
			end := time.Now().Add(minute)
			var users sync.WaitGroup
			var mu sync.Mutex
			var got uint64
			for range 8 {
				users.Go(func() {
					for {
						wait := l.Ready()
						if !time.Now().Add(wait).Before(end) {
							return
						}
						if wait > 0 {
							time.Sleep(wait)
							continue
						}
						l.Spend(1, request)
						mu.Lock()
						if got++; !c.ops {
							got += request - 1
						}
						mu.Unlock()
					}
				})
			}
			users.Wait()
			one := uint64(1)
			if !c.ops {
				one = request
			}
			if got > c.most+one || got+one < c.most {
				t.Errorf("%+v: %d in a minute, want %d", c.r, got, c.most)
			}
		})
	}
}

// One request at a time is let through, whoever asks; one that finds nothing does not
// keep the others out for long.
func TestOneByOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := Rates{IOPS: 1, IOPSBurst: 1}.Limiter()
		if l.Ready() != 0 {
			t.Fatal("the first one waits")
		}
		if wait := l.Ready(); wait != admission {
			t.Fatalf("a second one waits %v before the first has said what it counts", wait)
		}
		time.Sleep(admission)
		if l.Ready() != 0 {
			t.Fatal("one that found no request keeps the others out")
		}
		l.Spend(1, 0)
		l.Spend(1, 0)
		if wait := l.Ready(); wait != time.Second {
			t.Fatalf("one operation too many costs %v", wait)
		}
		l.Spend(8000, 0) // a wait has an end, and the debt is looked at again
		if wait := l.Ready(); wait != longest {
			t.Fatalf("a large debt: %v", wait)
		}
	})
}

func TestNone(t *testing.T) {
	if (Rates{}).Limiter() != nil || (Rates{BPSBurst: MinBurst}).Limiter() != nil {
		t.Error("a limiter without a limit")
	}
	(*Limiter)(nil).Spend(1, 1)
}

func TestSet(t *testing.T) {
	for options, want := range map[string]Rates{
		"bps=10M/s,bps-burst=1M,iops=500,iops-burst=7": {10 << 20, 1 << 20, 500, 7},
		"iops=1":                {IOPS: 1},
		"bps=1125899906842624":  {BPS: maxRate},
		"bps=1,bps-burst=65536": {BPS: 1, BPSBurst: MinBurst},
	} {
		got, err := set(options)
		if err == nil {
			err = got.Validate()
		}
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", options, got, err)
		}
		if again, err := set(strings.TrimPrefix(got.String(), ",")); err != nil || again != got {
			t.Errorf("%s: again %+v, %v", got, again, err)
		}
	}
	for _, bad := range []string{"bps=0", "bps=", "bps=-1", "bps=fast", "bps=1P", "bps=1125899906842625", "iops=0", "iops=1K", "iops-burst=0",
		"bps-burst=1M", "iops-burst=1", "bps=1,bps-burst=65535"} {
		r, err := set(bad)
		if err == nil {
			err = r.Validate()
		}
		if err == nil {
			t.Errorf("%s is %+v", bad, r)
		}
	}
	if known, err := new(Rates).Set("rate", "1"); known || err != nil {
		t.Error("rate= is a limit")
	}
	if s := (Rates{10 << 20, 0, 500, 0}).Describe(); s != "at most 10.0 MiB/s, 500 operations/s" {
		t.Error(s)
	}
}

func set(options string) (r Rates, err error) {
	for option := range strings.SplitSeq(options, ",") {
		key, value, _ := strings.Cut(option, "=")
		if _, err := r.Set(key, value); err != nil {
			return r, err
		}
	}
	return r, nil
}
