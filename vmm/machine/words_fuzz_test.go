package machine

import (
	"strings"
	"testing"
)

// FuzzWords reads the words of every kind's flags: they are refused in one line, or
// give a spec that says in one line what it is.
func FuzzWords(f *testing.F) {
	for _, words := range []string{
		"path=a.img,readonly,direct,queues=2", "path=a,,b.img", "tap=t0,bridge=br0,mac=52:54:00:00:00:01,queues=2", "path=/run/v,cid=3", "", "=", ",,,",
	} {
		f.Add(words)
	}
	f.Fuzz(func(t *testing.T, words string) {
		for _, k := range Kinds() {
			if k.Parse == nil {
				continue
			}
			s, err := k.Parse(words)
			if err != nil {
				if strings.ContainsAny(err.Error(), "\n\r\x1b") {
					t.Errorf("%s %q: error %q", k.Name, words, err)
				}
				continue
			}
			if err := s.Validate(); err != nil && strings.ContainsAny(err.Error(), "\r\x1b") {
				t.Errorf("%s %q: error %q", k.Name, words, err)
			}
			_ = s.String()
		}
	})
}
